"""Creates are answered 503 with a reason on a real full disk and with a real lost database."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from serve_app.config import AuthConfig, Config
from serve_app.gateway.app import create_app
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from tests.gateway.conftest import Server
from tests.support.disks import Disk
from tests.support.fakes import until
from tests.support.links import LinkTo

CREATE = {"prompt": "a red circle moves right"}


async def test_a_full_disk_pauses_admission(
    small_disk: Disk, server: Server, monkeypatch: pytest.MonkeyPatch, held: asyncio.Event
) -> None:
    monkeypatch.setattr("serve_app.gateway.videos.admission._HOLDS_S", 0.05)
    running = await server.create()
    small_disk.fill(leave=500_000)

    async def refused() -> httpx.Response | None:
        answer = await server.http.post("/v1/videos", json=CREATE)
        return answer if answer.status_code == 503 else None

    answer = await until(refused)
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "unavailable")
    assert error["message"].startswith("No videos are accepted at the moment: storage: ")
    assert "MiB free, expected 1" in error["message"]
    assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("5", "true")
    assert (await server.http.post(f"/v1/videos/{running['id']}/remix", json=CREATE)).status_code == 503
    assert (await server.http.get(f"/v1/videos/{running['id']}")).status_code == 200
    small_disk.free()

    async def accepted() -> bool:
        return (await server.http.post("/v1/videos", json=CREATE)).status_code == 200

    await until(accepted)
    held.set()
    assert (await server.ended(running["id"]))["status"] == "completed"


async def test_a_storage_that_is_gone_pauses_admission(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.gateway.videos.admission._HOLDS_S", 0)
    named = {"idempotency-key": "before"}
    before = (await server.http.post("/v1/videos", json=CREATE, headers=named)).json()["id"]
    await server.ended(before)
    moved = server.storage.folder.rename(server.storage.folder.with_name("moved"))
    again = await server.http.post("/v1/videos", json=CREATE, headers=named)
    assert (again.status_code, again.json()["id"]) == (200, before)  # that one was accepted
    other = await server.http.post("/v1/videos", json={"prompt": "x"}, headers=named)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert (await server.http.post("/v1/videos", json=CREATE, headers={"idempotency-key": "new"})).status_code == 503
    answer = await server.http.post("/v1/videos", json=CREATE)
    assert answer.status_code == 503 and "cannot be written to" in answer.json()["error"]["message"]
    moved.rename(server.storage.folder)
    assert (await server.http.post("/v1/videos", json=CREATE)).status_code == 200


async def test_a_storage_that_hangs_pauses_admission(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.gateway.videos.admission._HOLDS_S", 0)
    monkeypatch.setattr("serve_app.gateway.videos.admission._WAIT_S", 0.1)
    gate, looks = asyncio.Event(), 0
    ping = server.storage.ping

    async def hangs() -> None:
        nonlocal looks
        looks += 1
        await gate.wait()
        await ping()

    server.storage.ping = hangs  # type: ignore[method-assign]
    for _ in range(3):
        answer = await server.http.post("/v1/videos", json=CREATE)
        assert answer.status_code == 503 and "has not answered" in answer.json()["error"]["message"]
    assert looks == 1
    gate.set()
    assert (await server.http.post("/v1/videos", json=CREATE)).status_code == 200


async def test_a_database_that_is_cut_off(
    postgres_url: str, link_to: LinkTo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = await link_to(5432)
    config = Config(home=str(tmp_path), auth=AuthConfig(mode="keys"))
    store, storage = JobStore(postgres_url.replace(":5432", f":{link.port}")), Storage(config.storage_url)
    await store.start()

    async def nothing() -> None:
        return None

    _, key = await store.keys.create("test", ["create", "read"])
    headers = {"authorization": f"Bearer {key}"}
    app = create_app(config, store, storage, nothing, nothing)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    url = "http://127.0.0.1"
    async with httpx.AsyncClient(transport=transport, base_url=url, timeout=30, headers=headers) as http:
        video = (await http.post("/v1/videos", json=CREATE)).json()
        path = f"/v1/videos/{video['id']}"
        await link.cut()
        for answer, again in (
            (await http.get(path), "true"),
            (await http.delete(path), "true"),
            (await http.post("/v1/videos", json=CREATE), "false"),  # nobody knows whether it was written down
            (await http.post("/v1/videos", json=CREATE, headers={"Idempotency-Key": "x"}), "true"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable"), answer.text
            assert answer.headers["x-should-retry"] == again and answer.headers["retry-after"] == "5"
            assert answer.json()["error"]["message"].startswith("The job store or the storage cannot be reached")
            assert "SELECT" not in answer.text and "INSERT" not in answer.text
        await link.join()
        assert (await http.get(path)).status_code == 200
        assert (await http.delete(path)).status_code == 200
    await store.close()


async def test_paused_is_told(server: Server) -> None:
    assert (await server.http.get("/readyz")).json()["status"] == "ready"
    await server.store.pause()

    async def told() -> bool:
        answer = await server.http.get("/readyz")
        return answer.status_code == 200 and answer.json()["status"] == "paused"

    await until(told)
    video = await server.create()
    await server.store.resume()
    assert (await server.ended(video["id"]))["status"] == "completed"
