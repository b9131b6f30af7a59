"""Calls on a job store that a dispatcher makes, one by one."""

from __future__ import annotations

from serve_app import config
from serve_app.db.tables import Job
from serve_app.errors import JobFailed
from serve_app.events import Done
from serve_app.jobs.store import JobStore
from tests.support.fakes import PARAMS

OPTIONS = config.DispatcherConfig(max_attempts=3, retry_s=0)
LOST = JobFailed("rank_lost", "A rank was lost.", retryable=True)
DONE = Done({"video": "videos/x/1/video.mp4"}, {"denoise": 1.5}, 123, ["a warning"])


async def create(store: JobStore, prompt: str = "a cat") -> Job:
    return await store.create(PARAMS.model_copy(update={"prompt": prompt}), "wan")


async def claim(store: JobStore, owner: str = "me", lease_s: float = 60) -> Job:
    await store.sweep(OPTIONS)
    job = await store.claim(owner, lease_s)
    assert job is not None
    return job


async def nothing_to_claim(store: JobStore, options: config.DispatcherConfig = OPTIONS) -> bool:
    await store.sweep(options)
    return await store.claim("other", 60) is None


async def get(store: JobStore, video_id: str) -> Job:
    job = await store.get(video_id)
    assert job is not None
    return job
