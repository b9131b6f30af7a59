"""`Idempotency-Key`: a retry of a request returns the same video."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import Server


async def post(server: Server, key: str, path: str = "/v1/videos", **more: Any) -> httpx.Response:
    headers = {"idempotency-key": key} | ({"content-type": "application/json"} if "content" in more else {})
    return await server.http.post(path, headers=headers, **more)


class Listener:
    """A broker that records announcements."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    async def announce(self, video_ids: Sequence[str]) -> bool:
        self.heard += video_ids
        return True


async def test_the_same_request_makes_one_video(server: Server, held: asyncio.Event) -> None:
    server.store._announcer = listener = Listener()
    fields = {"prompt": "a cat", "size": "64x64"}
    answers = await asyncio.gather(*(post(server, "one", json=fields) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    # The seed was drawn once.
    assert len({(answer.json()["id"], answer.json()["seed"]) for answer in answers}) == 1
    swapped = await post(server, "one", content='{"size": "64x64",\n "prompt": "a cat"}')
    assert swapped.json()["id"] == answers[0].json()["id"]
    assert listener.heard == [swapped.json()["id"]]
    held.set()
    done = await server.ended(swapped.json()["id"])
    assert (await post(server, "one", json=fields)).json() == done
    assert (await post(server, "two", json=fields)).json()["id"] != done["id"]
    assert len((await server.http.get("/v1/videos")).json()["data"]) == 2


async def test_another_request_is_refused(server: Server, held: asyncio.Event) -> None:
    video = (await post(server, "one", json={"prompt": "a cat"})).json()
    other = await post(server, "one", json={"prompt": "a dog"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert other.json()["error"]["param"] == "Idempotency-Key" and other.headers["x-should-retry"] == "false"
    remix = await post(server, "one", f"/v1/videos/{video['id']}/remix", json={"prompt": "a cat"})
    assert remix.status_code == 409
    remixes = [await post(server, "r", f"/v1/videos/{video['id']}/remix", json={"prompt": "a dog"}) for _ in range(2)]
    assert remixes[0].json()["id"] == remixes[1].json()["id"] != video["id"]
    for more in (
        {"start_at": time.time() + 1000},
        {"deadline_s": 60},
        {"seed": 1},
    ):  # everything counts, not the pixels alone
        assert (await post(server, "one", json={"prompt": "a cat", **more})).status_code == 409
    assert (await post(server, "bad", json={"prompt": ""})).status_code == 400
    assert (await post(server, "bad", json={"prompt": "x"})).status_code == 200  # nothing was made before


async def test_forms(server: Server, held: asyncio.Event) -> None:
    def parts() -> dict[str, Any]:
        return {"files": {"prompt": (None, "a cat"), "seed": (None, "7")}}

    first, again = await post(server, "form", **parts()), await post(server, "form", **parts())
    assert first.headers["content-type"] and first.json()["id"] == again.json()["id"]
    assert first.request.headers["content-type"] != again.request.headers["content-type"]  # the boundary


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9", "tab\there"])
async def test_malformed(server: Server, key: str) -> None:
    headers = [(b"idempotency-key", key.encode("latin-1"))]
    answer = await server.http.post("/v1/videos", json={"prompt": "x"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")
