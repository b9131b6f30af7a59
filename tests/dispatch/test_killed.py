"""A dispatcher whose process is killed: another takes its jobs over and continues them."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from serve_app import config
from serve_app.dispatch.dispatcher import Dispatcher
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from tests.support.fakes import PARAMS, FakePipeline, files, until

LEASE_S = 1.0
# Its pipeline saves a state after each of 1000 steps and would take a minute.
DISPATCHER = """
import asyncio, sys
from serve_app import config
from serve_app.dispatch.dispatcher import Dispatcher
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from tests.support.fakes import FakePipeline

async def main(url, folder, lease_s):
    store, storage = JobStore(url), Storage(folder)
    await store.start()
    options = config.DispatcherConfig(lease_s=float(lease_s), poll_s=0.05)
    Dispatcher(store, storage, FakePipeline(storage, step_s=0.06, saving=True), options).start()
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("earlier_failures", [0, pytest.param(2, marks=pytest.mark.slow)])
async def test_another_dispatcher_continues(
    store: JobStore, store_url: str, tmp_path: Path, earlier_failures: int
) -> None:
    storage = Storage(str(tmp_path / "videos"))
    video_id = (await store.create(PARAMS.model_copy(update={"num_inference_steps": 1000}), "wan")).id
    command = (sys.executable, "-c", DISPATCHER, store_url, str(storage.folder), str(LEASE_S))
    killed = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=asyncio.subprocess.DEVNULL)

    async def far() -> bool:
        job = await store.get(video_id)
        return job is not None and job.stage == "denoise" and job.step >= 3

    await until(far)
    killed.send_signal(signal.SIGKILL)
    assert await killed.wait() == -signal.SIGKILL
    async with store._db.write() as session:
        job = await store._locked(session, video_id)
        assert job is not None
        job.failures = earlier_failures

    pipeline = FakePipeline(storage, saving=True)
    # Its own lease outlasts whatever holds up this machine, which would be an attempt more.
    options = config.DispatcherConfig(lease_s=60, poll_s=0.05, retry_s=0.1, max_attempts=4)
    dispatcher = Dispatcher(store, storage, pipeline, options)
    dispatcher.start()

    async def completed() -> bool:
        job = await store.get(video_id)
        return job is not None and job.status == "completed"

    await until(completed)
    job = await store.get(video_id)
    assert job is not None
    # It began where the other one was, which forgives all failures before.
    assert (job.attempt, job.failures) == (2, 0) and job.resumed_step >= 3
    assert job.outputs["video"] == f"videos/{video_id}/2/video.mp4"

    async def only_the_video() -> bool:
        return all(name.startswith(f"videos/{video_id}/2/") for name in files(storage))

    await until(only_the_video)
    await dispatcher.stop()
