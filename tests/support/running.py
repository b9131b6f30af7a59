"""Dispatchers on a store and a storage, and questions that tests ask of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app import config
from serve_app.db.tables import Job
from serve_app.dispatch.dispatcher import Dispatcher
from serve_app.dispatch.run import Runner
from serve_app.errors import JobFailed
from serve_app.jobs.store import JobStore
from serve_app.request import Urgency
from serve_app.storage import Storage
from tests.support.clock import MovableClock
from tests.support.fakes import PARAMS, files, until

OPTIONS = config.DispatcherConfig(poll_s=0.03, lease_s=20, retry_s=0.01, running_jobs=4, max_attempts=3)
Start = Callable[..., Dispatcher]


@pytest.fixture
def storage(tmp_path: Path, store_url: str, request: pytest.FixtureRequest) -> Storage:
    """Yield an empty storage: a folder; with --slow, S3 beside PostgreSQL."""
    if store_url.startswith("sqlite") or not request.config.getoption("--slow"):
        return Storage(str(tmp_path / "videos"))
    storage: Storage = request.getfixturevalue("s3_storage")
    return storage


@pytest.fixture
async def start(store: JobStore, storage: Storage, clock: MovableClock) -> AsyncIterator[Start]:
    """Start dispatchers, and stop them after the test."""
    started: list[Dispatcher] = []

    def begin(run: Runner, **options: Any) -> Dispatcher:
        dispatcher = Dispatcher(store, storage, run, OPTIONS.model_copy(update=options), clock=clock)
        dispatcher.start()
        started.append(dispatcher)
        return dispatcher

    yield begin
    for dispatcher in started:
        await dispatcher.stop()


async def create(store: JobStore, **urgency: Any) -> str:
    return (await store.create(PARAMS, "wan", Urgency(**urgency))).id


async def ended(store: JobStore, video_id: str, status: str) -> Job:
    async def look() -> Job | None:
        job = await store.get(video_id)
        return job if job is not None and job.finished else None

    job: Job = await until(look)
    assert job.status == status, (job.error_code, job.error_message)
    return job


def expected_files(video_id: str, attempt: int) -> list[str]:
    return [f"videos/{video_id}/{attempt}/{name}" for name in ("spritesheet.jpg", "thumbnail.jpg", "video.mp4")]


def lost(step: int | None = None) -> JobFailed:
    return JobFailed("rank_lost", "A rank was lost.", retryable=True, step=step)


async def no_files(storage: Storage) -> bool:
    return not files(storage)


async def lease_until(store: JobStore, video_id: str) -> float:
    job = await store.get(video_id)
    assert job is not None and job.lease_until is not None
    return job.lease_until


async def running(store: JobStore, video_id: str) -> bool:
    job = await store.get(video_id)
    return job is not None and job.stage == "denoise"
