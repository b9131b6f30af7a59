"""The videos API: from a create request to a deleted video."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from serve_app.gateway.videos.service import Videos
from serve_app.request import Params
from tests.gateway.conftest import Server
from tests.support.databases import count_queued
from tests.support.fakes import files, until


async def test_create_and_retrieve(server: Server) -> None:
    answer = await server.http.post("/v1/videos", json={"prompt": "一个红色的圆形", "seed": 5, "size": "128x64"})
    assert answer.status_code == 200
    video = answer.json()
    assert video["object"] == "video" and video["status"] == "queued" and video["progress"] == 0
    assert (video["prompt"], video["seed"], video["size"], video["seconds"]) == (
        "一个红色的圆形",
        5,
        "128x64",
        "2.0625",
    )
    assert (video["width"], video["height"], video["num_frames"], video["fps"]) == (128, 64, 33, 16)
    assert video["model"] == server.config.model.name
    assert video["queue_position"] == 1
    assert isinstance(video["created_at"], int) and video["error"] is None
    done = await server.ended(video["id"])
    assert (done["status"], done["progress"], done["attempts"]) == ("completed", 100, 1)
    assert done["timings"] == {"encode": 0.1, "denoise": 2.0, "decode": 0.3}
    assert done["warnings"] == ["The prompt is short."]
    assert done["completed_at"] >= done["created_at"] and done["queue_position"] is None
    assert done["size_bytes"] == 200_000


async def test_what_the_bundled_model_does_not_know_is_said_from_the_start(server: Server, held: asyncio.Event) -> None:
    video = await server.create(prompt="a cat rides a skateboard")
    (warning,) = video["warnings"]
    assert "circle, square, triangle, star" in warning
    assert (await server.http.get("/v1/videos")).json()["data"][0]["warnings"] == [warning]
    held.set()
    assert (await server.ended(video["id"]))["warnings"] == [warning, "The prompt is short."]
    remix = await server.http.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "a star grows"})
    assert remix.json()["warnings"] == []

    async def wake() -> None:
        server.dispatcher.wake()

    model = server.config.model.model_copy(update={"path": "/models/a14b"})
    videos = Videos(server.config.model_copy(update={"model": model}), server.store, server.storage, wake)
    assert (await videos.submit({"prompt": "a cat rides a skateboard"})).warnings == []


async def test_a_seed_is_drawn_and_shown(server: Server) -> None:
    first, second = await server.create(), await server.create()
    assert first["seed"] != second["seed"]
    assert (await server.http.get(f"/v1/videos/{first['id']}")).json()["seed"] == first["seed"]


async def test_multipart_and_forms_take_text(server: Server) -> None:
    fields = {
        "prompt": "猫 🐈",
        "seconds": "1",
        "size": "128x64",
        "fps": "8",
        "seed": "7",
        "guidance_scale": "3.5",
        "num_inference_steps": "2",
    }
    form = await server.http.post("/v1/videos", data=fields)
    parts = await server.http.post("/v1/videos", files={name: (None, value) for name, value in fields.items()})
    for answer in (form, parts):
        assert answer.status_code == 200, answer.text
        video = answer.json()
        assert (video["prompt"], video["num_frames"], video["fps"], video["seed"]) == ("猫 🐈", 9, 8, 7)
        assert (video["guidance_scale"], video["guidance_scale_2"]) == (3.5, 3.5)
        assert (await server.ended(video["id"]))["status"] == "completed"


async def test_how_soon(server: Server, held: asyncio.Event) -> None:
    video = await server.create()
    assert (video["priority"], video["deadline_at"]) == ("standard", None)
    video = await server.create(priority="interactive", deadline_s=90)
    assert video["priority"] == "interactive" and 89 <= video["deadline_at"] - video["created_at"] <= 91
    answer = await server.http.post("/v1/videos", data={"prompt": "x", "priority": "batch", "deadline_s": "0.5"})
    assert answer.json()["priority"] == "batch", answer.text
    video = await server.ended(answer.json()["id"])
    assert (video["status"], video["error"]["code"]) == ("failed", "deadline_exceeded")
    nothing = await server.create(priority=None, deadline_s=None)
    assert (nothing["priority"], nothing["deadline_at"]) == ("standard", None)


async def test_urgent_videos_stand_in_front(server: Server, held: asyncio.Event) -> None:
    for _ in range(8):  # as many as the dispatcher runs at once
        await server.create()

    async def busy() -> bool:
        return len(server.pipeline.jobs) == 8

    await until(busy)
    first, second = await server.create(priority="batch"), await server.create(priority="interactive")
    assert (first["queue_position"], second["queue_position"]) == (1, 1)
    assert (await server.http.get(f"/v1/videos/{first['id']}")).json()["queue_position"] == 2
    held.set()
    for video in (first, second):
        await server.ended(video["id"])
    assert [job.id for job in server.pipeline.jobs[8:]] == [second["id"], first["id"]]


async def test_length(server: Server) -> None:
    for fields, frames in (
        ({"seconds": "2"}, 33),
        ({"seconds": 2}, 33),
        ({"seconds": 5.0}, 81),
        ({"seconds": "0.01"}, 1),
        ({"seconds": "1", "fps": 24}, 25),
        ({"num_frames": 5}, 5),
    ):
        assert (await server.create(**fields))["num_frames"] == frames, fields


async def test_list(server: Server) -> None:
    ids = [(await server.create(seed=seed))["id"] for seed in range(5)]
    page = (await server.http.get("/v1/videos", params={"limit": 2})).json()
    assert [video["id"] for video in page["data"]] == [ids[4], ids[3]]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[4], ids[3], True)
    page = (await server.http.get("/v1/videos", params={"after": ids[1], "order": "asc"})).json()
    assert [video["id"] for video in page["data"]] == ids[2:] and page["has_more"] is False
    page = (await server.http.get("/v1/videos", params={"after": ids[0]})).json()
    assert (page["data"], page["first_id"], page["last_id"]) == ([], None, None)
    for query, param in (("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("order=up", "order")):
        answer = await server.http.get(f"/v1/videos?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    answer = await server.http.get("/v1/videos?after=nonsense")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")


async def test_progress_and_poll_header(server: Server, held: asyncio.Event) -> None:
    video_id = (await server.create())["id"]

    async def half_way() -> Any:
        answer = await server.http.get(f"/v1/videos/{video_id}")
        return answer if answer.json()["progress"] > 2 else None

    answer = await until(half_way)
    video = answer.json()
    assert (video["status"], video["stage"], video["steps"], video["progress"]) == ("in_progress", "denoise", 4, 24)
    assert 100 <= int(answer.headers["openai-poll-after-ms"]) <= 5000
    held.set()
    await server.ended(video_id)
    answer = await server.http.get(f"/v1/videos/{video_id}")
    assert "openai-poll-after-ms" not in answer.headers


async def test_cancel(server: Server, held: asyncio.Event) -> None:
    video_id = (await server.create())["id"]

    async def running() -> bool:
        return bool(server.pipeline.jobs)

    await until(running)
    answer = await server.http.post(f"/v1/videos/{video_id}/cancel")
    assert (answer.status_code, answer.json()["id"]) == (200, video_id)
    video = await server.ended(video_id)
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")
    again = await server.http.post(f"/v1/videos/{video_id}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (200, "cancelled")


async def test_delete(server: Server, held: asyncio.Event) -> None:
    video_id = (await server.create())["id"]

    async def running() -> bool:
        return bool(server.pipeline.jobs)

    async def stopped() -> bool:
        return server.pipeline.ended == [video_id] and not files(server.storage)

    await until(running)
    answer = await server.http.delete(f"/v1/videos/{video_id}")
    assert answer.json() == {"id": video_id, "object": "video.deleted", "deleted": True}
    await until(stopped)
    held.set()
    done = await server.completed()
    assert (await server.http.delete(f"/v1/videos/{done['id']}")).status_code == 200

    async def gone() -> bool:
        return not files(server.storage)

    await until(gone)
    for path in ("", "/content"):
        assert (await server.http.get(f"/v1/videos/{done['id']}{path}")).status_code == 404


async def test_remix(server: Server) -> None:
    source = await server.completed(seed=3, size="64x64", num_frames=9, priority="batch", deadline_s=60)
    answer = await server.http.post(f"/v1/videos/{source['id']}/remix", json={"prompt": "a blue star"})
    assert answer.status_code == 200
    remix = answer.json()
    assert remix["remixed_from_video_id"] == source["id"] and remix["id"] != source["id"]
    for field in set(Params.model_fields) - {"prompt"}:
        assert remix[field] == source[field]
    assert (remix["priority"], remix["deadline_at"]) == ("batch", None)
    assert (await server.ended(remix["id"]))["prompt"] == "a blue star"
    for body, param in (({}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": "x", "seed": 1}, "seed")):
        answer = await server.http.post(f"/v1/videos/{source['id']}/remix", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_not_offered(server: Server) -> None:
    for path in ("edits", "extensions", "characters"):
        for body in ({"json": {"prompt": "x"}}, {"data": {"prompt": "x"}}):
            answer = await server.http.post(f"/v1/videos/{path}", **body)  # type: ignore[arg-type]
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported")


async def test_queue_bound(server: Server, held: asyncio.Event) -> None:
    statuses = [(await server.http.post("/v1/videos", json={"prompt": "x"})).status_code for _ in range(60)]
    assert set(statuses) == {200, 429}
    answer = await server.http.post("/v1/videos", json={"prompt": "x"})
    assert answer.json()["error"]["code"] == "queue_full"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) > 0 and answer.headers["x-should-retry"] == "true"
    assert await count_queued(server.store) == 30


async def test_failed_video(server: Server) -> None:
    server.pipeline.errors = [ZeroDivisionError("x")]
    video = await server.ended((await server.create())["id"])
    assert video["status"] == "failed"
    assert set(video["error"]) == {"code", "message"} and video["error"]["code"] == "internal_error"


async def test_create_without_a_dispatcher(server: Server) -> None:
    """A job is in the queue even if no dispatcher hears of it."""

    async def deaf() -> None:
        raise ConnectionError("gone")

    videos = Videos(server.config, server.store, server.storage, deaf)
    assert (await videos.submit({"prompt": "x"})).status == "queued"


async def test_watch(server: Server, held: asyncio.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.gateway.videos.service._WATCH_S", (0.01, 0.01))

    async def wake() -> None:
        server.dispatcher.wake()

    videos = Videos(server.config, server.store, server.storage, wake)
    video = await videos.submit({"prompt": "x"})
    seen = []
    async for change in videos.watch(video.id):
        seen.append(change)
        if change.step == 1:
            held.set()
    assert seen[-1].status == "completed"
    assert {change.status for change in seen} >= {"in_progress", "completed"}
    assert [change.progress for change in seen] == sorted(change.progress for change in seen)
    assert all(one != two for one, two in itertools.pairwise(seen))
