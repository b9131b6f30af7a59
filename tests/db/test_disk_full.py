"""A job store whose disk is full, or that cannot be reached: what runs goes on, and its end is recorded later."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.exc import SQLAlchemyError

from serve_app.config import DispatcherConfig as Options
from serve_app.db.database import STORE_AWAY
from serve_app.dispatch.dispatcher import Dispatcher
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from tests.support.clock import MovableClock
from tests.support.disks import Disk
from tests.support.fakes import PARAMS, FakePipeline, until
from tests.support.links import LinkTo


async def test_a_running_job_survives_a_full_disk(
    small_disk: Disk, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("elsewhere")))
    store = JobStore(f"sqlite:///{small_disk.folder / 'jobs.db'}")
    await store.start()
    clock = MovableClock()
    clock.lead(store.database)
    gate = asyncio.Event()
    pipeline = FakePipeline(storage, gate=gate)
    dispatcher = Dispatcher(store, storage, pipeline, Options(poll_s=0.03, lease_s=30, retry_s=0.01), clock=clock)
    dispatcher.start()
    video_id = (await store.create(PARAMS, "wan")).id

    async def begun() -> bool:
        return bool(pipeline.jobs)

    await until(begun)
    small_disk.fill()
    with pytest.raises(SQLAlchemyError, match="full"):
        for _ in range(1000):  # what the log of the last transactions has left
            await store.create(PARAMS, "wan")
    gate.set()

    async def made() -> bool:
        return video_id in pipeline.ended

    await until(made)
    caplog.clear()
    clock.advance(31)  # its lease is over by then

    async def noticed() -> bool:
        return "store unreachable" in caplog.messages

    # A dispatcher renews leases three times in their length, so one whose lease is over has seen that it cannot.
    await until(noticed)
    job = await store.get(video_id)
    assert job is not None and job.status == "in_progress"
    dispatcher.raise_if_ended()
    small_disk.free()

    async def completed() -> bool:
        job = await store.get(video_id)
        return job is not None and job.status == "completed" and job.attempt == 1

    await until(completed)
    await dispatcher.stop()
    await store.close()


async def test_a_database_that_hangs_is_away(
    postgres_url: str, link_to: LinkTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.db.database._ANSWER_S", 3)
    link = await link_to(5432)
    store = JobStore(postgres_url.replace(":5432", f":{link.port}"))
    await store.start()
    job = await store.create(PARAMS, "wan")
    link.stall()
    async with asyncio.timeout(30):
        with pytest.raises(STORE_AWAY):
            await store.get(job.id)
    link.flow()

    async def back() -> bool:
        try:
            return await store.get(job.id) is not None
        except STORE_AWAY:
            return False

    await until(back, 20)
    await store.delete(job.id)
    await store.close()
