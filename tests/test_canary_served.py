"""A canary of the tiny architecture beside the stable pipeline, on a real Ray, from shadow mode to promotion."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import select

from serve_app.db.rollouts import Shadow
from serve_app.jobs.store import JobStore
from tests.support.databases import on_store
from tests.support.deployed import BIN, end, wait_ready, write_config
from tests.support.plain_http import http
from tests.support.ports import free_port


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
    jobs = f"sqlite:///{tmp_path / 'home/jobs.db'}"
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
        on_store(jobs, lambda store: store.set_canary("wan-next", 0, "wan"))
        first = made(url, seed=5)

        async def copied(store: JobStore) -> Shadow | None:
            async with store.database.read() as session:
                return await session.scalar(select(Shadow).where(Shadow.outcome != "running"))

        deadline = time.monotonic() + 300
        while (copy := on_store(jobs, copied)) is None:
            assert time.monotonic() < deadline
            time.sleep(1)
        assert (copy.job_id, copy.outcome, copy.error) == (first["id"], "equal", None)

        on_store(jobs, lambda store: store.set_canary("wan-next", 100, "wan"))
        second = made(url, seed=6)
        pipelines = [on_store(jobs, lambda store, id_=one["id"]: store.get(id_)).pipeline for one in (first, second)]
        assert pipelines == ["wan", "wan-next"]
        ((generation, _),) = on_store(jobs, lambda store: store.generations())
        assert (generation.name, generation.state) == ("v1", "current")

        on_store(jobs, lambda store: store.promote("wan-next", "wan"))
        assert http.get(f"{url}/readyz", timeout=30).json()["status"] == "ready"
        # A name that nothing is deployed under holds nobody up.
        on_store(jobs, lambda store: store.set_canary("wan-third", 100, "wan"))
        created = made(url, seed=7)["id"]
        third = on_store(jobs, lambda store: store.get(created))
        assert (third.pipeline, third.failures) == ("wan-next", 0)
    finally:
        end(process)
