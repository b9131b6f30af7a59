from __future__ import annotations

import asyncio
import json
import logging
from functools import partial
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from serve_app.db.tables import id_time
from serve_app.dispatch.dispatcher import Dispatcher
from serve_app.dispatch.run import PipelineUnavailable
from serve_app.job_spec import JobSpec
from serve_app.jobs.store import JobStore
from serve_app.logs import JsonFormatter
from serve_app.storage import Storage
from tests.support.clock import MovableClock
from tests.support.databases import count_queued
from tests.support.fakes import PARAMS, FakePipeline, files, until
from tests.support.running import OPTIONS, Start, create, ended, expected_files, lease_until, running


async def test_drives_jobs_to_the_end(store: JobStore, storage: Storage, start: Start) -> None:
    pipeline = FakePipeline(storage)
    ids = [await create(store) for _ in range(10)]
    start(pipeline)
    for video_id in ids:
        job = await ended(store, video_id, "completed")
        assert job.outputs["video"] == f"videos/{video_id}/1/video.mp4"
        assert (job.progress, job.stage, job.attempt, job.failures) == (100, "decode", 1, 0)
        assert job.timings == {"encode": 0.1, "denoise": 2.0, "decode": 0.3}
        assert job.warnings == ["The prompt is short."]
    assert [job.id for job in pipeline.jobs] == ids
    assert pipeline.jobs[0] == JobSpec(
        id=ids[0],
        params=PARAMS,
        prefix=f"videos/{ids[0]}/1",
        attempt=1,
        state_prefix=f"samples/{ids[0]}",
        priority="standard",
        created_at=id_time(ids[0]) or 0.0,
        losses=0,
    )


async def test_runs_no_more_than_it_may(store: JobStore, storage: Storage, start: Start) -> None:
    gate = asyncio.Event()
    ids = [await create(store) for _ in range(6)]
    dispatcher = start(FakePipeline(storage, gate=gate), running_jobs=2)

    async def busy() -> bool:
        return dispatcher.running == 2

    await until(busy)
    await asyncio.sleep(0.15)
    assert dispatcher.running == 2 and await count_queued(store) == 4
    gate.set()
    for video_id in ids:
        await ended(store, video_id, "completed")


async def test_wake_beats_the_poll(store: JobStore, storage: Storage, start: Start) -> None:
    claim, looked = store.claim, asyncio.Event()

    async def told(*given: Any) -> Any:
        job = await claim(*given)
        looked.set()
        return job

    store.claim = told  # type: ignore[assignment, method-assign]
    dispatcher = start(FakePipeline(storage), poll_s=30)
    await asyncio.wait_for(looked.wait(), 60)
    video_id = await create(store)
    dispatcher.wake()
    await ended(store, video_id, "completed")


async def test_a_deadline_passes_in_the_queue(
    store: JobStore, storage: Storage, start: Start, clock: MovableClock
) -> None:
    pipeline = FakePipeline(storage, gate=asyncio.Event())
    busy = await create(store)
    start(pipeline, running_jobs=1)  # no room for another: it fails all the same
    await until(lambda: running(store, busy))
    video_id = await create(store, deadline_s=60)
    clock.advance(61)
    assert (await ended(store, video_id, "failed")).error_code == "deadline_exceeded"
    assert [job.id for job in pipeline.jobs] == [busy]


async def test_urgent_jobs_go_first(store: JobStore, storage: Storage, start: Start) -> None:
    ids = [await create(store, priority=priority) for priority in ("batch", "standard", "interactive")]
    pipeline = FakePipeline(storage)
    start(pipeline, running_jobs=1)
    for video_id in ids:
        await ended(store, video_id, "completed")
    assert [job.id for job in pipeline.jobs] == ids[::-1]
    assert [job.priority for job in pipeline.jobs] == ["interactive", "standard", "batch"]


async def test_pipeline_unavailable_costs_no_attempt(
    store: JobStore, storage: Storage, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.dispatch.dispatcher.UNAVAILABLE_S", 0.01)
    video_id = await create(store)
    start(FakePipeline(storage, errors=[PipelineUnavailable("not deployed")] * 5))
    job = await ended(store, video_id, "completed")
    assert (job.attempt, job.failures) == (6, 0)


async def test_delete_completed_removes_its_files(store: JobStore, storage: Storage, start: Start) -> None:
    video_id, other = await create(store), await create(store)
    start(FakePipeline(storage))
    await ended(store, video_id, "completed")
    await ended(store, other, "completed")
    await store.delete(video_id)

    async def only_the_other() -> bool:
        return files(storage) == expected_files(other, 1)

    await until(only_the_other)


async def test_takeover_after_a_silent_dispatcher(
    store: JobStore, storage: Storage, start: Start, clock: MovableClock
) -> None:
    """A dispatcher freezes while its run goes on, and another takes the job: the first run's video must not count."""
    gate = asyncio.Event()
    slow, quick = FakePipeline(storage, gate=gate), FakePipeline(storage)
    video_id = await create(store)
    frozen = start(slow)
    await until(lambda: running(store, video_id))
    assert frozen._loop_task is not None
    frozen._loop_task.cancel()
    start(quick)
    clock.advance(OPTIONS.lease_s + 1)
    job = await ended(store, video_id, "completed")
    assert (job.attempt, job.interruptions, job.outputs["video"]) == (2, 1, f"videos/{video_id}/2/video.mp4")
    gate.set()

    async def both_ended() -> bool:
        return slow.ended == [video_id] and files(storage) == expected_files(video_id, 2)

    await until(both_ended)
    after = await store.get(video_id)
    assert after is not None and after.outputs == job.outputs
    with pytest.raises(RuntimeError, match="loop has ended"):
        frozen.raise_if_ended()


async def test_leases_outlive_quiet_stages(
    store: JobStore, storage: Storage, start: Start, clock: MovableClock
) -> None:
    gate = asyncio.Event()
    first, second = FakePipeline(storage, gate=gate), FakePipeline(storage)
    video_id = await create(store)
    start(first)
    await until(lambda: running(store, video_id))
    start(second)
    for _ in range(3):  # longer than a lease
        renewed = await lease_until(store, video_id) + 0.4 * OPTIONS.lease_s
        clock.advance(0.4 * OPTIONS.lease_s)

        async def is_renewed(by: float = renewed) -> bool:
            return await lease_until(store, video_id) >= by

        await until(is_renewed)
    gate.set()
    assert (await ended(store, video_id, "completed")).attempt == 1
    assert second.jobs == []


async def test_stop_hands_jobs_back(store: JobStore, storage: Storage, start: Start) -> None:
    gate = asyncio.Event()
    pipeline = FakePipeline(storage, gate=gate)
    video_id = await create(store)
    dispatcher = start(pipeline)
    await until(lambda: running(store, video_id))
    await dispatcher.stop()
    job = await store.get(video_id)
    assert job is not None
    assert (job.status, job.attempt, job.failures, job.lease_owner) == ("queued", 1, 0, None)
    assert pipeline.ended == [video_id]
    dispatcher.raise_if_ended()
    gate.set()
    start(pipeline)
    assert (await ended(store, video_id, "completed")).attempt == 2


async def test_store_away_for_a_while(store: JobStore, storage: Storage, start: Start) -> None:
    """Neither the loop nor a finished video is lost when the database cannot be reached."""
    gate = asyncio.Event()
    video_id = await create(store)
    dispatcher = start(FakePipeline(storage, gate=gate))
    await until(lambda: running(store, video_id))
    database = store._db

    asked, often = 0, asyncio.Event()

    def away() -> Any:
        nonlocal asked
        asked += 1
        if asked == 6:
            often.set()
        raise OperationalError("SELECT 1", {}, ConnectionRefusedError("away"))

    database.write = database.read = away  # type: ignore[method-assign]
    gate.set()
    await asyncio.wait_for(often.wait(), 60)
    dispatcher.raise_if_ended()
    del database.write, database.read
    assert (await ended(store, video_id, "completed")).attempt == 1


async def test_an_outage_costs_nobody_a_lease(
    store: JobStore, store_url: str, storage: Storage, start: Start, clock: MovableClock
) -> None:
    """Leases run out while no dispatcher can renew; the first to come back does not take the others for dead."""
    gate = asyncio.Event()
    first, second = FakePipeline(storage, gate=gate), FakePipeline(storage, gate=gate)
    other = JobStore(store_url)
    await other.start()
    clock.lead(other.database)
    video_id = await create(store)
    slow = start(first, running_jobs=1)
    await until(lambda: running(store, video_id))
    quick = Dispatcher(other, storage, second, OPTIONS, clock=clock)
    quick.start()
    asked = {store: asyncio.Event(), other: asyncio.Event()}

    def away(one: JobStore) -> Any:
        asked[one].set()
        raise OperationalError("SELECT 1", {}, ConnectionRefusedError("away"))

    for one in asked:
        one._db.write = one._db.read = partial(away, one)  # type: ignore[method-assign]
    for noticed in asked.values():
        await asyncio.wait_for(noticed.wait(), 60)
    clock.advance(OPTIONS.lease_s + 1)
    del other._db.write, other._db.read
    new = await create(other)
    quick.wake()
    await until(lambda: running(other, new))  # it has looked around
    assert [job.id for job in second.jobs] == [new]
    del store._db.write, store._db.read
    slow.wake()
    gate.set()
    for job_id in (video_id, new):
        assert (await ended(store, job_id, "completed")).attempt == 1
    await quick.stop()
    await other.close()


async def test_a_broken_loop_shows(store: JobStore, storage: Storage, start: Start) -> None:
    dispatcher = start(FakePipeline(storage))
    dispatcher.raise_if_ended()

    async def broken(*_: Any) -> Any:
        raise KeyError("a bug")

    store.claim = broken  # type: ignore[assignment, method-assign]

    async def noticed() -> bool:
        try:
            dispatcher.raise_if_ended()
        except RuntimeError as error:
            return isinstance(error.__cause__, KeyError)
        return False

    await until(noticed)


async def test_two_dispatchers_share(store: JobStore, storage: Storage, start: Start) -> None:
    first, second = FakePipeline(storage, step_s=0.01), FakePipeline(storage, step_s=0.01)
    ids = [await create(store) for _ in range(20)]
    start(first)
    start(second)
    for video_id in ids:
        assert (await ended(store, video_id, "completed")).attempt == 1
    ran = [job.id for job in first.jobs + second.jobs]
    assert sorted(ran) == sorted(ids)
    assert first.jobs and second.jobs


def test_log_lines() -> None:
    record = logging.makeLogRecord({"name": "serve_app.x", "msg": "claimed %d", "args": (1,), "job": "video_1"})
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["job"], line["logger"]) == ("claimed 1", "video_1", "serve_app.x")
    assert "\n" not in JsonFormatter().format(record)
