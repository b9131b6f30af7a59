"""Two versions of a pipeline on one real Ray, and two clusters on one database, with a random tiny model."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import select

from serve_app.db.notifications import Event
from serve_app.db.rollouts import Shadow
from serve_app.jobs.store import JobStore
from tests.support.databases import postgres_url
from tests.support.deployed import BIN, end, wait_ready, write_config
from tests.support.plain_http import http
from tests.support.ports import free_port

__all__ = ["postgres_url"]


def on_store(place: Path | str, work: Callable[[JobStore], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        store = JobStore(place if isinstance(place, str) else f"sqlite:///{place / 'home/jobs.db'}")
        await store.start()
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(main())


def made(url: str, **fields: Any) -> dict[str, Any]:
    """Create a video and return it once it is completed."""
    video = http.post(f"{url}/v1/videos", json={"prompt": "a star", **fields}, timeout=30).json()
    deadline = time.monotonic() + 300
    while video["status"] != "completed":
        assert video["status"] != "failed" and time.monotonic() < deadline, video
        time.sleep(0.2)
        video = http.get(f"{url}/v1/videos/{video['id']}", timeout=30).json()
    return dict(video)


@pytest.mark.slow
def test_from_shadow_mode_to_promotion_and_back(tmp_path: Path, checkpoint: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    file = write_config(tmp_path, checkpoint, port)
    content = yaml.safe_load(file.read_text())
    content["applications"][0]["args"]["dispatcher"] = {"canary": {"shadow": True, "bake_s": 0}, "poll_s": 0.5}
    args = content["applications"][0]["args"]
    for application in content["applications"]:
        application["args"] = args
    own = {**args, "denoiser": {**args["denoiser"], "samples_per_step": 4}}
    following = {**content["applications"][0], "name": "wan-next", "args": own}
    content["applications"].insert(1, following)
    file.write_text(yaml.safe_dump(content, allow_unicode=True))
    environment = {**os.environ, "WAN_SERVE_GENERATION": "v1"}
    process = subprocess.Popen([BIN / "wan-serve", "up", file, "--own-ray"], cwd=tmp_path, env=environment)
    try:
        wait_ready(url, process)
        on_store(tmp_path, lambda store: store.set_canary("wan-next", 0, "wan"))
        first = made(url, seed=5)

        async def copied(store: JobStore) -> Shadow | None:
            async with store.database.read() as session:
                return await session.scalar(select(Shadow).where(Shadow.outcome != "running"))

        deadline = time.monotonic() + 300
        while (copy := on_store(tmp_path, copied)) is None:
            assert time.monotonic() < deadline
            time.sleep(1)
        assert (copy.job_id, copy.outcome, copy.error) == (first["id"], "equal", None)

        on_store(tmp_path, lambda store: store.set_canary("wan-next", 100, "wan"))
        second = made(url, seed=6)
        pipelines = [
            on_store(tmp_path, lambda store, id_=one["id"]: store.get(id_)).pipeline for one in (first, second)
        ]
        assert pipelines == ["wan", "wan-next"]
        ((generation, _),) = on_store(tmp_path, lambda store: store.generations())
        assert (generation.name, generation.state) == ("v1", "current")

        on_store(tmp_path, lambda store: store.promote("wan-next", "wan"))
        assert http.get(f"{url}/readyz", timeout=30).json()["status"] == "ready"
        # A name that nothing is deployed under holds nobody up.
        on_store(tmp_path, lambda store: store.set_canary("wan-third", 100, "wan"))
        created = made(url, seed=7)["id"]
        third = on_store(tmp_path, lambda store: store.get(created))
        assert (third.pipeline, third.failures) == ("wan-next", 0)
    finally:
        end(process)


@pytest.mark.slow
def test_a_new_cluster_takes_over_from_an_old_one(tmp_path: Path, checkpoint: Path, postgres_url: str) -> None:
    servers: dict[str, tuple[str, subprocess.Popen[bytes]]] = {}

    def start(generation: str) -> str:
        port = free_port()
        (tmp_path / generation).mkdir()
        file = write_config(tmp_path / generation, checkpoint, port)
        content = yaml.safe_load(file.read_text())
        args = content["applications"][0]["args"]
        args.update(home=str(tmp_path / "home"), store={"url": postgres_url}, dispatcher={"drain_s": 5, "poll_s": 0.5})
        for application in content["applications"]:
            application["args"] = args
        file.write_text(yaml.safe_dump(content, allow_unicode=True))
        environment = {**os.environ, "WAN_SERVE_GENERATION": generation}
        process = subprocess.Popen([BIN / "wan-serve", "up", file, "--own-ray"], cwd=tmp_path, env=environment)
        servers[generation] = f"http://127.0.0.1:{port}", process
        wait_ready(*servers[generation])
        return servers[generation][0]

    def created(url: str) -> str:
        body = {"prompt": "a star", "num_inference_steps": 60}
        return str(http.post(f"{url}/v1/videos", json=body, timeout=30).json()["id"])

    async def current(store: JobStore) -> str:
        return (await store.generations())[0][0].name

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.5)

    try:
        old = start("v1")
        before = [created(old) for _ in range(6)]
        new = start("v2")
        until(lambda: on_store(postgres_url, current) == "v2")
        after = [created(url) for url in (old, new)]
        end(servers["v1"][1])

        async def counts(store: JobStore) -> dict[str, int]:
            return await store.counts()

        until(lambda: on_store(postgres_url, counts) == {"completed": 8})

        async def look(store: JobStore) -> tuple[list[int], list[int], list[str]]:
            async with store.database.read() as session:
                events = [*await session.scalars(select(Event.video_id))]
            jobs = [await store.get(name) for name in (*before, *after)]
            return [job.failures for job in jobs], [job.interruptions for job in jobs], events

        failures, interruptions, events = on_store(postgres_url, look)
        assert failures == interruptions == [0] * 8 and sorted(events) == sorted([*before, *after])
        for name in (*before, *after):
            assert http.get(f"{new}/v1/videos/{name}/content", timeout=30).status_code == 200
    finally:
        for _, process in servers.values():
            end(process)
