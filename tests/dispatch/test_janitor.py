"""Jobs that have ended are forgotten after a while, row and files together."""

from __future__ import annotations

import asyncio

import pytest

from serve_app import config
from serve_app.config import RetentionConfig
from serve_app.errors import JobFailed
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from tests.support.clock import MovableClock
from tests.support.fakes import FakePipeline, files, until
from tests.support.running import Start, create, ended, expected_files


@pytest.mark.parametrize("kept", ["completed", "failed"])
async def test_row_and_files_go_together(
    store: JobStore, storage: Storage, start: Start, clock: MovableClock, kept: str
) -> None:
    forgotten = "failed" if kept == "completed" else "completed"
    store._retention = RetentionConfig(**{f"{kept}_s": 0, f"{forgotten}_s": 3600})
    failing, sound = await create(store), await create(store)
    start(FakePipeline(storage, errors=[JobFailed("out_of_memory", "Too large.")]), running_jobs=1)
    ids = {"failed": failing, "completed": sound}
    stays, goes = ids.pop(kept), next(iter(ids.values()))

    async def gone() -> bool:
        return await store.get(goes) is None

    job = await ended(store, stays, kept)
    assert job.expires_at is None
    await ended(store, goes, forgotten)
    clock.advance(3601)
    await until(gone)

    async def only_the_other() -> bool:
        return files(storage) == (expected_files(stays, 1) if kept == "completed" else [])

    await until(only_the_other)
    assert await store.get(stays) is not None


async def test_times_and_portions(store: JobStore) -> None:
    for _ in range(3):
        await store.request_cancel(await create(store))
    jobs, _ = await store.list()
    for job in jobs:
        assert job.completed_at is not None and job.expires_at == job.completed_at + 7 * 86400
    assert await store.expire() == 0
    store._retention = RetentionConfig(failed_s=1e-9)
    for _ in range(101):
        await store.request_cancel(await create(store))
    assert (await store.expire(), await store.expire(), await store.expire()) == (100, 1, 0)
    assert await store.counts() == {"cancelled": 3}


def test_the_default_is_a_week() -> None:
    assert config.Config().retention == RetentionConfig(completed_s=604800, failed_s=604800)


async def test_a_storage_that_hangs_costs_no_lease(store: JobStore, storage: Storage, start: Start) -> None:
    """A storage that refuses does not keep the rest from going on either."""
    refused = asyncio.Event()

    async def hangs(_: str) -> int:
        if not refused.is_set():
            refused.set()
            raise OSError("storage: not now")
        await asyncio.Event().wait()
        return 0

    gone = await create(store)
    start(FakePipeline(storage))
    await ended(store, gone, "completed")
    storage.delete_prefix = hangs  # type: ignore[assignment, method-assign]
    await store.delete(gone)
    await refused.wait()
    dispatcher = start(FakePipeline(storage), lease_s=3)
    video_id = await create(store)
    assert (await ended(store, video_id, "completed")).attempt == 1
    dispatcher.raise_if_ended()
    assert f"videos/{gone}" in [item.prefix for item in await store.garbage()]
    del storage.delete_prefix

    start(FakePipeline(storage))

    async def removed() -> bool:
        return files(storage) == expected_files(video_id, 1)

    await until(removed)
