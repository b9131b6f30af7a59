"""`wan-serve jobs` on a store that other processes use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.errors import ServeAppError
from serve_app.jobs.store import JobStore
from serve_app.jobs.tables import Job
from tests.jobs.fakes import PARAMS, until

TINY = Path(__file__).parent.parent / "configs/tiny.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    content = yaml.safe_load(TINY.read_text())
    for application in content["applications"]:
        application["args"]["home"] = str(tmp_path)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def run(config: Path, *words: str) -> str:
    command, *more = words
    result = CliRunner().invoke(cli, ["jobs", command, "--config", str(config), *more])
    if result.exception is not None:
        raise result.exception
    return result.output


def on_store(config: Path, work: Any) -> Any:
    async def main() -> Any:
        store = JobStore(f"sqlite:///{config.parent / 'jobs.db'}")
        await store.start()
        try:
            return await work(store)
        finally:
            await store.close()

    coroutine: Coroutine[Any, Any, Any] = main()
    return asyncio.run(coroutine)


def test_pause_resume_and_status(config: Path) -> None:
    async def create(store: JobStore) -> Job:
        return await store.create(PARAMS, "wan")

    async def claim(store: JobStore) -> Job | None:
        return await store.claim("me", 60)

    job = on_store(config, create)
    assert run(config, "pause").strip() == "paused; 0 jobs run"
    assert run(config, "pause").strip() == "paused already; 0 jobs run"
    assert on_store(config, claim) is None
    text = run(config, "status")
    assert "paused since 20" in text and "1  queued" in text
    assert run(config, "resume").strip() == "resumed"
    assert run(config, "resume").strip() == "was not paused"
    assert on_store(config, claim).id == job.id
    text = run(config, "status")
    assert text.startswith("running") and "1  in_progress" in text


def test_list_and_show(config: Path) -> None:
    async def create(store: JobStore) -> list[str]:
        return [(await store.create(PARAMS, "wan")).id for _ in range(3)]

    ids = on_store(config, create)
    text = run(config, "list", "--limit", "2")
    assert ids[2] in text and ids[1] in text and ids[0] not in text and "… and more" in text
    shown = json.loads(run(config, "show", ids[1]))
    assert (shown["id"], shown["status"], shown["queue_position"]) == (ids[1], "queued", 2)
    assert shown["params"]["prompt"] == PARAMS.prompt
    with pytest.raises(ServeAppError, match="ID has value 'video_x', expected the id of a job"):
        run(config, "show", "video_x")


async def test_drain_waits_for_what_runs(config: Path) -> None:
    store = JobStore(f"sqlite:///{config.parent / 'jobs.db'}")
    await store.start()
    job = await store.create(PARAMS, "wan")
    assert await store.claim("me", 60) is not None
    draining = asyncio.create_task(asyncio.to_thread(run, config, "drain"))

    async def paused() -> bool:
        return await store.paused_since() is not None

    await until(paused)
    await asyncio.sleep(0.3)
    assert not draining.done()
    await store.fail(job.id, 1, "x", "y")
    assert (await draining).splitlines() == ["paused; 1 jobs run", "paused; no job runs"]
    await store.close()
