from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from serve_app import config
from serve_app.errors import JobFailed
from serve_app.events import Done, Event, Progress
from serve_app.jobs.dispatcher import Dispatcher
from serve_app.jobs.run import PipelineUnavailable, Runner
from serve_app.jobs.store import JobStore
from serve_app.jobs.tables import Job, id_time
from serve_app.logs import JsonFormatter
from serve_app.request import Urgency
from serve_app.storage import Storage
from tests.jobs.fakes import PARAMS, FakePipeline, files, until

OPTIONS = config.Dispatcher(poll_s=0.03, lease_s=20, retry_s=0.01, running_jobs=4, max_attempts=3)
Start = Callable[..., Dispatcher]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "videos"))


@pytest.fixture
async def start(store: JobStore, storage: Storage) -> AsyncIterator[Start]:
    """Starts dispatchers, and stops them after the test."""
    started: list[Dispatcher] = []

    def begin(run: Runner, **options: Any) -> Dispatcher:
        dispatcher = Dispatcher(store, storage, run, OPTIONS.model_copy(update=options))
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
    assert [job["id"] for job in pipeline.jobs] == ids
    assert pipeline.jobs[0] == {
        "id": ids[0],
        "attempt": 1,
        "params": PARAMS.model_dump(),
        "prefix": f"videos/{ids[0]}/1",
        "state_prefix": f"samples/{ids[0]}",
        "priority": "standard",
        "created_at": id_time(ids[0]),
    }


async def test_runs_no_more_than_it_may(store: JobStore, storage: Storage, start: Start) -> None:
    gate = asyncio.Event()
    ids = [await create(store) for _ in range(6)]
    dispatcher = start(FakePipeline(storage, gate=gate), running_jobs=2)

    async def busy() -> bool:
        return dispatcher.running == 2

    await until(busy)
    await asyncio.sleep(0.15)
    assert dispatcher.running == 2 and await store.count_queued() == 4
    gate.set()
    for video_id in ids:
        await ended(store, video_id, "completed")


async def test_wake_beats_the_poll(store: JobStore, storage: Storage, start: Start) -> None:
    dispatcher = start(FakePipeline(storage), poll_s=30)
    await asyncio.sleep(0.1)
    video_id = await create(store)
    dispatcher.wake()
    await ended(store, video_id, "completed")


async def test_progress_is_written_and_the_last_step_is_not_held_back(
    store: JobStore, storage: Storage, start: Start
) -> None:
    written: list[tuple[str | None, int]] = []
    progress = store.progress

    async def recording(video_id: str, attempt: int, event: Progress, resumed_step: int) -> bool:
        written.append((event.stage, event.step))
        return await progress(video_id, attempt, event, resumed_step)

    store.progress = recording  # type: ignore[method-assign]
    gate = asyncio.Event()
    video_id = await create(store)
    start(FakePipeline(storage, gate=gate))

    async def shown() -> bool:
        job = await store.get(video_id)
        # Step 1 comes right after step 0 and is not written at once; the run then waits before step 2.
        return job is not None and (job.stage, job.step) == ("denoise", 1)

    await until(shown)
    gate.set()
    await ended(store, video_id, "completed")
    for stage, step in (("encode", 0), ("encode", 1), ("denoise", 0), ("denoise", 4), ("decode", 0), ("decode", 1)):
        assert (stage, step) in written
    assert written.index(("denoise", 4)) < written.index(("decode", 0))


async def test_unretryable_failure(store: JobStore, storage: Storage, start: Start) -> None:
    video_id = await create(store)
    start(FakePipeline(storage, errors=[JobFailed("out_of_memory", "Needs 80 GiB.")]))
    job = await ended(store, video_id, "failed")
    assert (job.error_code, job.error_message, job.attempt) == ("out_of_memory", "Needs 80 GiB.", 1)


async def test_retryable_failure_gets_another_attempt(store: JobStore, storage: Storage, start: Start) -> None:
    video_id = await create(store)
    pipeline = FakePipeline(storage, errors=[lost()])
    start(pipeline)
    job = await ended(store, video_id, "completed")
    assert (job.attempt, job.failures, job.error_code) == (2, 1, None)
    assert files(storage) == expected_files(video_id, 2)


async def test_gives_up(store: JobStore, storage: Storage, start: Start) -> None:
    video_id = await create(store)
    start(FakePipeline(storage, errors=[lost()] * 3))
    job = await ended(store, video_id, "failed")
    assert (job.error_code, job.attempt) == ("rank_lost", 3)
    assert job.error_message == "A rank was lost. Gave up after 3 attempts in a row."


async def test_the_second_attempt_does_not_wait_for_a_poll(store: JobStore, storage: Storage, start: Start) -> None:
    video_id = await create(store)
    start(FakePipeline(storage, errors=[lost()]), poll_s=60, retry_s=60)
    assert (await ended(store, video_id, "completed")).attempt == 2


async def test_attempts_that_get_further_are_not_counted(store: JobStore, storage: Storage, start: Start) -> None:
    """A group is lost after every step; each attempt begins where the one before was."""
    begun: list[int] = []

    async def run(job: dict[str, Any]) -> AsyncGenerator[Event, None]:
        step = len(begun)
        begun.append(step)
        yield Progress("encode", 0, 1)
        yield Progress("denoise", step, 8)
        if step == 8:
            yield Done({}, {}, 0)
        yield Progress("denoise", step + 1, 8)
        raise lost(step + 2)

    video_id = await create(store)
    start(run, max_attempts=2, retry_s=60)
    job = await ended(store, video_id, "completed")
    assert begun == list(range(9))
    assert (job.attempt, job.failures, job.resumed_step) == (9, 0, 8)


async def test_a_step_that_loses_its_group_twice_is_poisonous(store: JobStore, storage: Storage, start: Start) -> None:
    video_id = await create(store)
    pipeline = FakePipeline(storage, errors=[lost(2), lost(2)], saving=True)
    start(pipeline, max_attempts=10)
    job = await ended(store, video_id, "failed")
    assert (job.error_code, job.attempt) == ("poisonous", 2)
    assert "2 times during step 2" in (job.error_message or "")
    await until(lambda: no_files(storage))


async def test_saved_states_last_until_the_job_has_ended(store: JobStore, storage: Storage, start: Start) -> None:
    video_id = await create(store)
    pipeline = FakePipeline(storage, errors=[lost()], gate=asyncio.Event(), saving=True)
    start(pipeline)
    assert pipeline.gate is not None
    pipeline.gate.set()

    async def only_the_video() -> bool:
        return files(storage) == expected_files(video_id, 2)

    job = await ended(store, video_id, "completed")
    assert (job.attempt, job.resumed_step, job.failures) == (2, 1, 0)
    await until(only_the_video)


async def test_the_beginning_is_told_although_the_store_was_away(
    store: JobStore, storage: Storage, start: Start
) -> None:
    """The one write that names it may fail: whichever comes next tells it again."""
    progress, refused = store.progress, 0

    async def refusing(video_id: str, attempt: int, event: Progress, resumed_step: int) -> bool:
        nonlocal refused
        if event.stage == "denoise" and not refused:
            refused += 1
            raise OperationalError("UPDATE", {}, ConnectionRefusedError("away"))
        return await progress(video_id, attempt, event, resumed_step)

    store.progress = refusing  # type: ignore[method-assign]

    async def run(job: dict[str, Any]) -> AsyncGenerator[Event, None]:
        yield Progress("denoise", 5, 8)
        raise lost()

    video_id = await create(store)
    start(run, max_attempts=1)
    job = await ended(store, video_id, "failed")
    assert (refused, job.resumed_step) == (1, 5)


async def test_a_run_ends_at_its_deadline(store: JobStore, storage: Storage, start: Start) -> None:
    """At the moment, that is, though the next poll is far away."""
    pipeline = FakePipeline(storage, gate=asyncio.Event(), stubborn=True)
    video_id = await create(store, deadline_s=0.8)
    start(pipeline, poll_s=30)
    job = await ended(store, video_id, "failed")
    assert (job.error_code, job.error_message) == ("deadline_exceeded", "Its deadline passed while it ran.")
    assert job.deadline_at is not None and job.completed_at is not None
    assert 0 <= job.completed_at - job.deadline_at < 0.5
    assert pipeline.ended == [video_id]
    await pipeline.late


async def test_a_deadline_passes_in_the_queue(store: JobStore, storage: Storage, start: Start) -> None:
    pipeline = FakePipeline(storage, gate=asyncio.Event())
    running = await create(store)
    start(pipeline, running_jobs=1)  # no room for another: it fails all the same
    await until(lambda: _running(store, running))
    video_id = await create(store, deadline_s=0.2)
    assert (await ended(store, video_id, "failed")).error_code == "deadline_exceeded"
    assert [job["id"] for job in pipeline.jobs] == [running]


async def test_a_video_that_is_there_in_time_is_kept(store: JobStore, storage: Storage, start: Start) -> None:
    """Its deadline passes while the store cannot be reached to record it."""
    complete = store.complete

    async def late(video_id: str, attempt: int, done: Done) -> bool:
        job = await store.get(video_id)
        assert job is not None and job.deadline_at is not None
        await asyncio.sleep(max(job.deadline_at - time.time(), 0) + 0.2)
        return await complete(video_id, attempt, done)

    store.complete = late  # type: ignore[method-assign]
    video_id = await create(store, deadline_s=1)
    start(FakePipeline(storage))
    job = await ended(store, video_id, "completed")
    assert job.completed_at is not None and job.deadline_at is not None and job.completed_at > job.deadline_at


async def test_urgent_jobs_go_first(store: JobStore, storage: Storage, start: Start) -> None:
    ids = [await create(store, priority=priority) for priority in ("batch", "standard", "interactive")]
    pipeline = FakePipeline(storage)
    start(pipeline, running_jobs=1)
    for video_id in ids:
        await ended(store, video_id, "completed")
    assert [job["id"] for job in pipeline.jobs] == ids[::-1]
    assert [job["priority"] for job in pipeline.jobs] == ["interactive", "standard", "batch"]


async def test_crash_is_an_internal_error(
    store: JobStore, storage: Storage, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    crashing, sound = await create(store), await create(store)
    start(FakePipeline(storage, errors=[ZeroDivisionError("division\nby zero")]), running_jobs=1)
    job = await ended(store, crashing, "failed")
    assert job.error_code == "internal_error"
    assert job.error_message == "An internal error ended this video: ZeroDivisionError: division"
    await ended(store, sound, "completed")
    record = next(record for record in caplog.records if record.exc_info)
    line = json.loads(JsonFormatter().format(record))
    assert line["job"] == crashing and "Traceback" in line["traceback"]


async def test_failure_wrapped_as_cause(store: JobStore, storage: Storage, start: Start) -> None:
    wrapped = RuntimeError("remote traceback")
    wrapped.cause = JobFailed("bad_prompt", "No.")  # type: ignore[attr-defined]
    video_id = await create(store)
    start(FakePipeline(storage, errors=[wrapped]))
    assert (await ended(store, video_id, "failed")).error_code == "bad_prompt"


async def test_stream_without_an_end(store: JobStore, storage: Storage, start: Start) -> None:
    async def run(_: dict[str, Any]) -> AsyncGenerator[Event, None]:
        yield Progress("encode", 0, 1)

    video_id = await create(store)
    start(run)
    job = await ended(store, video_id, "failed")
    assert job.error_message == "The pipeline ended without a video."


async def test_pipeline_unavailable_costs_no_attempt(
    store: JobStore, storage: Storage, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.jobs.dispatcher.UNAVAILABLE_S", 0.01)
    video_id = await create(store)
    start(FakePipeline(storage, errors=[PipelineUnavailable("not deployed")] * 5))
    job = await ended(store, video_id, "completed")
    assert (job.attempt, job.failures) == (6, 0)


async def test_cancel_running(store: JobStore, storage: Storage, start: Start) -> None:
    pipeline = FakePipeline(storage, gate=asyncio.Event(), stubborn=True)
    video_id = await create(store)
    dispatcher = start(pipeline, poll_s=0.05)
    await until(lambda: _running(store, video_id))
    await store.request_cancel(video_id)
    dispatcher.wake()
    job = await ended(store, video_id, "failed")
    assert (job.error_code, job.error_message) == ("cancelled", "Cancelled while it ran.")
    assert pipeline.ended == [video_id]
    await pipeline.late  # its files appear after all
    await until(lambda: no_files(storage))


async def test_delete_running(store: JobStore, storage: Storage, start: Start) -> None:
    pipeline = FakePipeline(storage, gate=asyncio.Event(), stubborn=True)
    video_id = await create(store)
    start(pipeline)
    await until(lambda: _running(store, video_id))
    assert await store.delete(video_id)

    async def stopped() -> bool:
        return pipeline.ended == [video_id]

    await until(stopped)
    await pipeline.late
    await until(lambda: no_files(storage))
    assert await store.get(video_id) is None


async def test_delete_completed_removes_its_files(store: JobStore, storage: Storage, start: Start) -> None:
    video_id, other = await create(store), await create(store)
    start(FakePipeline(storage))
    await ended(store, video_id, "completed")
    await ended(store, other, "completed")
    await store.delete(video_id)

    async def only_the_other() -> bool:
        return files(storage) == expected_files(other, 1)

    await until(only_the_other)


async def test_takeover_after_a_silent_dispatcher(store: JobStore, storage: Storage, start: Start) -> None:
    """One freezes while its run goes on; another takes the job; the first one's video must not count."""
    gate = asyncio.Event()
    slow, quick = FakePipeline(storage, gate=gate), FakePipeline(storage)
    video_id = await create(store)
    frozen = start(slow, lease_s=0.3)
    await until(lambda: _running(store, video_id))
    assert frozen._loop_task is not None
    frozen._loop_task.cancel()
    start(quick)
    job = await ended(store, video_id, "completed")
    assert (job.attempt, job.failures, job.outputs["video"]) == (2, 1, f"videos/{video_id}/2/video.mp4")
    gate.set()

    async def both_ended() -> bool:
        return slow.ended == [video_id] and files(storage) == expected_files(video_id, 2)

    await until(both_ended)
    after = await store.get(video_id)
    assert after is not None and after.outputs == job.outputs
    with pytest.raises(RuntimeError, match="loop has ended"):
        frozen.check()


async def test_leases_outlive_quiet_stages(store: JobStore, storage: Storage, start: Start) -> None:
    gate = asyncio.Event()
    first, second = FakePipeline(storage, gate=gate), FakePipeline(storage)
    video_id = await create(store)
    start(first, lease_s=0.6)
    await until(lambda: _running(store, video_id))
    start(second, lease_s=0.6)
    await asyncio.sleep(1.2)
    gate.set()
    assert (await ended(store, video_id, "completed")).attempt == 1
    assert second.jobs == []


async def test_stop_hands_jobs_back(store: JobStore, storage: Storage, start: Start) -> None:
    gate = asyncio.Event()
    pipeline = FakePipeline(storage, gate=gate)
    video_id = await create(store)
    dispatcher = start(pipeline)
    await until(lambda: _running(store, video_id))
    await dispatcher.stop()
    job = await store.get(video_id)
    assert job is not None
    assert (job.status, job.attempt, job.failures, job.lease_owner) == ("queued", 1, 0, None)
    assert pipeline.ended == [video_id]
    dispatcher.check()
    gate.set()
    start(pipeline)
    assert (await ended(store, video_id, "completed")).attempt == 2


async def test_store_away_for_a_while(store: JobStore, storage: Storage, start: Start) -> None:
    """Neither the loop nor a finished video is lost when the database cannot be reached."""
    gate = asyncio.Event()
    video_id = await create(store)
    dispatcher = start(FakePipeline(storage, gate=gate))
    await until(lambda: _running(store, video_id))
    database = store._db

    def away() -> Any:
        raise OperationalError("SELECT 1", {}, ConnectionRefusedError("away"))

    database.write = database.read = away  # type: ignore[method-assign]
    gate.set()
    await asyncio.sleep(0.4)
    dispatcher.check()
    del database.write, database.read
    assert (await ended(store, video_id, "completed")).attempt == 1


async def test_an_outage_costs_nobody_a_lease(store: JobStore, store_url: str, storage: Storage, start: Start) -> None:
    """Leases run out while no dispatcher can renew; the first to come back does not take the others for dead."""
    gate = asyncio.Event()
    first, second = FakePipeline(storage, gate=gate), FakePipeline(storage, gate=gate)
    other = JobStore(store_url)
    await other.start()
    video_id = await create(store)
    slow = start(first, lease_s=0.5, running_jobs=1)
    await until(lambda: _running(store, video_id))
    quick = Dispatcher(other, storage, second, OPTIONS.model_copy(update={"lease_s": 0.5}))
    quick.start()

    def away() -> Any:
        raise OperationalError("SELECT 1", {}, ConnectionRefusedError("away"))

    for one in (store, other):
        one._db.write = one._db.read = away  # type: ignore[method-assign]
    await asyncio.sleep(0.6)
    del other._db.write, other._db.read
    new = await create(other)
    quick.wake()
    await until(lambda: _running(other, new))  # it has looked around
    assert [job["id"] for job in second.jobs] == [new]
    del store._db.write, store._db.read
    slow.wake()
    gate.set()
    for job_id in (video_id, new):
        assert (await ended(store, job_id, "completed")).attempt == 1
    await quick.stop()
    await other.close()


async def test_a_broken_loop_shows(store: JobStore, storage: Storage, start: Start) -> None:
    dispatcher = start(FakePipeline(storage))
    dispatcher.check()

    async def broken(*_: Any) -> Any:
        raise KeyError("a bug")

    store.claim = broken  # type: ignore[method-assign]

    async def noticed() -> bool:
        try:
            dispatcher.check()
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
    ran = [job["id"] for job in first.jobs + second.jobs]
    assert sorted(ran) == sorted(ids)
    assert first.jobs and second.jobs


async def _running(store: JobStore, video_id: str) -> bool:
    job = await store.get(video_id)
    return job is not None and job.stage == "denoise"


def test_log_lines() -> None:
    record = logging.makeLogRecord({"name": "serve_app.x", "msg": "claimed %d", "args": (1,), "job": "video_1"})
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["job"], line["logger"]) == ("claimed 1", "video_1", "serve_app.x")
    assert "\n" not in JsonFormatter().format(record)
