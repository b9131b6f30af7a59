"""Server-Sent Events, on a real socket."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.conftest import Server
from tests.support.fakes import until


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.gateway.videos.service._WATCH_S", (0.01, 0.02))


@pytest.fixture
async def http(client: openai.AsyncOpenAI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=str(client.base_url), timeout=20) as http:
        yield http


async def read(answer: httpx.Response) -> AsyncIterator[dict[str, str]]:
    """Yield events as a browser reads them; comments as {"": text}."""
    event: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if not line:
            if event:
                yield event
            event = {}
            continue
        name, _, value = line.partition(": ")
        event[name] = event[name] + "\n" + value if name in event else value


@asynccontextmanager
async def following(
    http: httpx.AsyncClient, video_id: str, **headers: str
) -> AsyncIterator[AsyncIterator[dict[str, str]]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with http.stream("GET", f"videos/{video_id}/events", headers=named) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        yield read(answer)


def videos(events: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [json.loads(event["data"]) for event in events if "data" in event]


async def test_from_the_queue_to_the_end(server: Server, http: httpx.AsyncClient, held: asyncio.Event) -> None:
    for _ in range(server.config.dispatcher.running_jobs):
        await server.create()

    async def busy() -> bool:
        return len(server.pipeline.jobs) == server.config.dispatcher.running_jobs

    await until(busy)
    first, second = await server.create(), await server.create()
    server.pipeline.step_s = 0.3  # longer than progress is held back: each step is written
    seen: list[dict[str, str]] = []
    async with following(http, second["id"]) as events:
        async for event in events:
            seen.append(event)
            if "data" in event and json.loads(event["data"])["queue_position"] == 2:
                await server.http.post(f"/v1/videos/{first['id']}/cancel")
            elif "data" in event and json.loads(event["data"])["queue_position"] == 1:
                held.set()
    assert seen[0] == {"retry": "2000"}
    changes = videos(seen)
    assert [change["queue_position"] for change in changes[:2]] == [2, 1]
    assert [event["event"] for event in seen[1:]] == [change["status"] for change in changes]
    assert {change["stage"] for change in changes} >= {None, "denoise"}
    assert len({change["step"] for change in changes if change["stage"] == "denoise"}) >= 2
    assert any(change["seconds_left"] for change in changes)
    assert changes[-1]["status"] == "completed" and changes[-1]["timings"]["denoise"] == 2.0
    assert all(change["status"] != "completed" for change in changes[:-1])
    assert all(one["id"] != two["id"] for one, two in itertools.pairwise(seen[1:]))


async def test_a_reconnect_goes_on(server: Server, http: httpx.AsyncClient, held: asyncio.Event) -> None:
    video_id = (await server.create())["id"]

    async def half_way() -> bool:
        return bool((await server.store.get(video_id)).step == 1)

    await until(half_way)
    async with following(http, video_id) as events:
        async for event in events:
            if "id" in event:
                break
    async with following(http, video_id, last_event_id=event["id"]) as events:
        held.set()
        later = [event async for event in events if "id" in event]
    assert event["id"] not in [one["id"] for one in later] and later[-1]["event"] == "completed"
    # Any reader gets the same id for the same state, from other replicas as well.
    async with following(http, video_id) as events:
        assert [one async for one in events if "id" in one] == later[-1:]
    answer = await http.get(f"videos/{video_id}/events", headers={"last-event-id": later[-1]["id"]})
    assert (answer.status_code, answer.content) == (204, b"")
    answer = await http.get(f"videos/{video_id}/events", headers={"last-event-id": event["id"]})
    assert answer.status_code == 200 and "event: completed" in answer.text


async def test_a_pause_is_told_to_those_that_wait(server: Server, http: httpx.AsyncClient, held: asyncio.Event) -> None:
    """Resource, list and events show a pause. `status` stays OpenAI's, and there is no estimate."""
    held.set()
    done = await server.completed()  # so that there is an estimate
    server.store._pace_at = float("-inf")  # which is looked up anew
    held.clear()
    for _ in range(server.config.dispatcher.running_jobs):
        running = await server.create()

    async def busy() -> bool:
        return len(server.pipeline.jobs) == server.config.dispatcher.running_jobs + 1

    await until(busy)
    video_id = (await server.create())["id"]
    changes: list[dict[str, Any]] = []
    async with following(http, video_id) as events:
        async for event in events:
            if "data" not in event:
                continue
            changes.append(json.loads(event["data"]))
            if changes[-1]["status"] == "queued" and not changes[-1]["paused"] and len(changes) == 1:
                await server.store.pause()
            elif changes[-1]["paused"]:
                listed = (await server.http.get("/v1/videos")).json()["data"]
                assert [video["id"] for video in listed if video["paused"]] == [video_id]
                for other in (running, done):  # they go on, or are there
                    assert not (await server.http.get(f"/v1/videos/{other['id']}")).json()["paused"]
                await server.store.resume()
                held.set()
    before, paused = changes[0], next(change for change in changes if change["paused"])
    assert before["seconds_left"] is not None and paused["seconds_left"] is None
    assert (paused["status"], paused["queue_position"]) == ("queued", 1)
    assert changes[-1]["status"] == "completed" and not changes[-1]["paused"]


@pytest.mark.parametrize("end", ["cancel", "delete"])
async def test_other_ends(server: Server, http: httpx.AsyncClient, held: asyncio.Event, end: str) -> None:
    video_id = (await server.create())["id"]
    seen: list[dict[str, Any]] = []
    async with following(http, video_id) as events:
        async for event in events:
            if not seen:
                path = f"/v1/videos/{video_id}"
                await (server.http.post(f"{path}/cancel") if end == "cancel" else server.http.delete(path))
            seen.append(event)
    last = json.loads(seen[-1]["data"])
    if end == "cancel":
        assert (seen[-1]["event"], last["error"]["code"]) == ("failed", "cancelled")
    else:
        assert seen[-1]["event"] == "deleted"
        assert last == {"id": video_id, "object": "video.deleted", "deleted": True}


async def test_a_quiet_stream_is_kept_alive(
    server: Server, http: httpx.AsyncClient, held: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.gateway.videos.sse.KEEP_ALIVE_S", 0.05)
    video_id = (await server.create())["id"]
    comments = 0
    async with following(http, video_id) as events:
        async for event in events:
            comments += "" in event or ":" in "".join(event)
            if comments == 3:
                held.set()
    assert comments >= 3 and event["event"] == "completed"


async def test_who_leaves_is_forgotten_and_too_many_are_refused(
    server: Server, http: httpx.AsyncClient, held: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = server.config.gateway.max_ongoing_requests // 2
    video_id = (await server.create())["id"]
    looks = 0
    get = server.store.get

    async def counted(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        return await get(*arguments)

    monkeypatch.setattr(server.store, "get", counted)
    async with AsyncExitStack() as streams:
        followed = [await streams.enter_async_context(following(http, video_id)) for _ in range(most)]
        for events in followed:
            assert await anext(events) == {"retry": "2000"}
        answer = await http.get(f"videos/{video_id}/events")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_streams")
        assert (answer.headers["x-should-retry"], answer.headers["retry-after"]) == ("true", "5")

    async def free() -> bool:
        async with http.stream("GET", f"videos/{video_id}/events") as answer:
            return answer.status_code == 200

    async def quiet() -> bool:
        before = looks
        await asyncio.sleep(0.2)
        return looks == before

    await until(free)
    await until(quiet)  # nobody looks for who has left
    assert (await server.http.get(f"/v1/videos/{video_id}")).json()["status"] == "in_progress"


async def test_no_such_video(http: httpx.AsyncClient) -> None:
    answer = await http.get("videos/video_x/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
