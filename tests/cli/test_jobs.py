"""`wan-serve jobs` on a store that other processes use."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer import BadParameter
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.cli.ray_logs import session_folders
from serve_app.db.tables import Job, new_id
from serve_app.errors import ServeAppError
from serve_app.jobs.store import JobStore
from tests.support.fakes import PARAMS, until

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"


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
    result = CliRunner().invoke(cli, ["jobs", command, "--config", str(config), *more], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def run_logs(*words: str) -> str:
    result = CliRunner().invoke(cli, ["jobs", "logs", *words], standalone_mode=False)
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
    assert text.splitlines()[0].split() == ["ID", "CREATED", "STATUS", "PRIORITY", "KEY", "WHAT"]
    shown = json.loads(run(config, "show", ids[1]))
    assert (shown["id"], shown["status"], shown["queue_position"]) == (ids[1], "queued", 2)
    assert shown["params"]["prompt"] == PARAMS.prompt
    with pytest.raises(ServeAppError, match="ID has value 'video_x', expected the id of a job"):
        run(config, "show", "video_x")


def test_a_cancelled_job_is_cancelled_and_a_failed_one_failed(config: Path) -> None:
    async def create(store: JobStore) -> list[str]:
        ids = [(await store.create(PARAMS, "wan")).id for _ in range(3)]
        assert await store.claim("me", 60) is not None
        await store.fail(ids[0], 1, "x", "y")
        await store.request_cancel(ids[1])
        return ids

    failed, cancelled, waits = on_store(config, create)
    for status, id_ in (("failed", failed), ("cancelled", cancelled), ("queued", waits)):
        lines = run(config, "list", "--status", status).splitlines()
        assert [line.split()[0] for line in lines] == ["ID", id_] and lines[1].split()[4 - 1] == status, lines
    assert len(run(config, "list", "--status", "in_progress").splitlines()) == 1
    text = run(config, "status")
    assert "1  failed" in text and "1  cancelled" in text and "1  queued" in text
    assert "paused" not in run(config, "list")
    run(config, "pause")
    assert "paused" in run(config, "list", "--status", "queued") and "paused" not in run(
        config, "list", "--status", "failed"
    )
    with pytest.raises(BadParameter, match=r"'done' is not one of 'queued', .*'cancelled'"):
        run(config, "list", "--status", "done")


def test_logs_of_a_job_from_all_sessions(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def create(store: JobStore) -> list[str]:
        return [(await store.create(PARAMS, "wan")).id for _ in range(2)]

    job, other = on_store(config, create)
    now = time.time()

    def at(seconds: float) -> str:
        return datetime.fromtimestamp(now + seconds, UTC).isoformat(timespec="milliseconds")

    old, new = (tmp_path / "ray" / f"session_{name}" / "logs" for name in ("1", "2"))
    (old / "serve").mkdir(parents=True)
    new.mkdir(parents=True)
    (tmp_path / "ray" / "session_latest").symlink_to(tmp_path / "ray" / "session_2")
    serve_time = datetime.fromtimestamp(now + 2).strftime("%Y-%m-%d %H:%M:%S,000")
    created = json.dumps({"time": at(1), "message": "created", "job": job})
    access = f"INFO {serve_time} gateway 1 x -- GET /v1/videos/{job} 200"
    completed = "(Dispatcher pid=7) " + json.dumps({"time": at(3), "message": "completed", "job": f"{job}.1"})
    (old / "worker-1.err").write_text(f"{completed}\n{json.dumps({'time': at(0), 'job': other})}\n")
    (old / "serve" / "replica_gateway.log").write_text(f"{access}\n")
    (new / "worker-2.err.1").write_bytes(b"\xff\xfe\n" + created.encode() + b"\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert run_logs(job).splitlines() == [created, access, completed]
    assert run_logs(job, "--ray-dir", str(tmp_path / "ray"), "--config", str(config)).splitlines()[0] == created
    silent = new_id()[0]
    with pytest.raises(
        ServeAppError, match=r"no line of video_\w+ on host '.*'; looked in '.*session_1/logs', '.*2/logs'"
    ):
        run_logs(silent)
    with pytest.raises(ServeAppError, match=r"ID has value '.*', expected the id of a job"):
        run_logs(silent, "--config", str(config))
    with pytest.raises(ServeAppError, match="ID has value 'video_x', expected the id of a job"):
        run_logs("video_x")
    with pytest.raises(ServeAppError, match="--ray-dir has value '/nowhere', expected a folder"):
        run_logs(job, "--ray-dir", "/nowhere")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "empty"))
    monkeypatch.setattr("serve_app.cli.ray_logs._running_sessions", lambda: iter(()))
    with pytest.raises(ServeAppError, match="no session of Ray is there"):
        run_logs(job)


def test_a_session_that_runs_is_found_by_its_process(tmp_path: Path) -> None:
    session = tmp_path / "elsewhere" / "session_3"
    session.mkdir(parents=True)
    code = "import sys; sys.stdin.read()"
    command = [sys.executable, "-c", code, f"--session_dir={session}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert session.resolve() in session_folders()
        assert process.stdin is not None
        process.stdin.close()


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
