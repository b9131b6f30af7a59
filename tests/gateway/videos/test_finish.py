"""Videos that are finished after the decode: what is asked for, what is shown, and which files there are."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import select

from serve_app.config import AuthConfig
from serve_app.db.tables import Usage
from tests.cli.test_generate import generate
from tests.gateway.conftest import Server

SMOOTH = {"upscale": 2, "interpolate": {"fps": 32}}


async def test_a_finished_video(server: Server) -> None:
    video = await server.completed(finish=SMOOTH)
    (job,) = server.pipeline.jobs
    assert job.finish is not None and job.finish.order == ("upscale", "interpolate")
    assert (video["finish"]["upscale"]["factor"], video["finish"]["interpolate"]["fps"]) == (2, 32)
    assert video["finished"]["fps"] == 32 and video["finished"]["seconds"] == {"interpolate": 0.4}
    assert (video["fps"], video["progress"], video["timings"]["finish"]) == (16, 100, 0.5)
    content = f"/v1/videos/{video['id']}/content"
    answer = await server.http.get(content)
    assert (answer.content, answer.headers["content-type"]) == (b"finished", "video/webm")
    assert answer.headers["content-disposition"] == f'inline; filename="{video["id"]}.webm"'
    assert len((await server.http.get(content, params={"variant": "plain"})).content) == 200_192
    answer = await server.http.get(content, params={"variant": "preview"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "The video has no preview.")


async def test_a_plain_video_has_no_more_than_before(server: Server) -> None:
    video = await server.completed(finish={})
    assert server.pipeline.jobs[0].finish is None and (video["finish"], video["finished"]) == (None, None)
    answer = await server.http.get(f"/v1/videos/{video['id']}/content", params={"variant": "plain"})
    assert answer.status_code == 404


async def test_a_form_and_a_remix(server: Server) -> None:
    answer = await server.http.post("/v1/videos", data={"prompt": "x", "finish": json.dumps(SMOOTH)})
    assert answer.status_code == 200, answer.text
    video = await server.ended(answer.json()["id"])
    remix = await server.http.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "y"})
    assert remix.json()["finish"] == video["finish"] == answer.json()["finish"]
    answer = await server.http.post("/v1/videos", data={"prompt": "x", "finish": "{"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "finish")
    assert answer.json()["error"]["message"].startswith("'finish' has value '{', expected JSON: ")


async def test_a_misspelt_step_is_named(server: Server) -> None:
    answer = await server.http.post("/v1/videos", json={"prompt": "x", "finish": {"interpolation": {}}})
    error: dict[str, Any] = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "finish")
    assert error["message"].startswith("Unknown field 'finish.interpolation', expected one of interpolate, ")


async def test_a_finish_goes_on_after_its_dispatcher(server: Server) -> None:
    """What is asked for is in the job's row, so whoever takes the job up does the same."""
    server.pipeline.errors = [RuntimeError("a dispatcher that dies takes this way as well")]
    server.pipeline.gate = asyncio.Event()
    video_id = (await server.create(finish=SMOOTH))["id"]
    job = await server.store.get(video_id)
    assert job is not None and job.finish == {
        "upscale": {"factor": 2},
        "interpolate": {"fps": 32},
        "order": ["upscale", "interpolate"],
    }
    while not server.pipeline.jobs:  # noqa: ASYNC110 (the dispatcher's loop)
        await asyncio.sleep(0.01)
    held = await server.store.get(video_id)
    assert held is not None and await server.store.release(video_id, held.attempt)
    server.pipeline.errors.clear()
    server.pipeline.gate.set()
    video = await server.ended(video_id)
    assert video["finished"] is not None and video["attempts"] == 2
    assert [one.finish for one in server.pipeline.jobs] == [server.pipeline.jobs[0].finish] * 2


async def test_the_command_line_asks_for_it(server: Server, client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    url, out = str(client.base_url).removesuffix("/v1/"), tmp_path / "out.webm"
    status, said = await generate(url, out, "--fps-out", "32")
    assert (status, out.read_bytes()) == (0, b"finished") and "64x64 at 32 fps" in said.replace("\n", "")
    assert server.pipeline.jobs[-1].finish is not None and server.pipeline.jobs[-1].finish.order == ("interpolate",)
    status, said = await generate(url, out, "--fps-out", "48", "--finish", '{"upscale": 4}')
    assert status == 0 and server.pipeline.jobs[-1].finish.order == ("upscale", "interpolate"), said
    for words, message in (
        (("--finish", "{upscale"), "--finish has value '{upscale', expected a profile's name, or JSON"),
        (("--finish", "soft", "--fps-out", "32"), "--fps-out is given with --finish 'soft', expected one of them"),
        (("--finish", "soft"), "'finish' is 'soft', expected an object: this server has no profiles."),
    ):
        status, said = await generate(url, out, *words)
        assert status == 1 and message in said.replace("\n", " "), said


class TestWithKeys:
    """A server with keys charges finishers' GPUs like those that denoise."""

    @pytest.fixture
    def auth(self) -> AuthConfig:
        return AuthConfig(mode="keys")

    async def test_gpus_of_finishers_are_charged(self, server: Server) -> None:
        _, headers = await server.key()
        answer: httpx.Response | None = None
        video = await server.create(headers, finish=SMOOTH)
        while answer is None or answer.json()["status"] != "completed":
            answer = await server.http.get(f"/v1/videos/{video['id']}", headers=headers)
        async with server.store.database.read() as session:
            (usage,) = await session.scalars(select(Usage))
        assert usage.gpu_seconds == 2.0 + 1.5
