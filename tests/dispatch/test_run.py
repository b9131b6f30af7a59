from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from serve_app.errors import JobFailed
from serve_app.events import Done, Event, Progress
from serve_app.job_spec import JobSpec
from serve_app.jobs.store import JobStore
from serve_app.logs import JsonFormatter
from serve_app.storage import Storage
from tests.support.clock import MovableClock
from tests.support.fakes import FakePipeline, files, until
from tests.support.running import Start, create, ended, expected_files, lost, no_files, running


async def test_progress_is_written_and_the_last_step_is_not_held_back(
    store: JobStore, storage: Storage, start: Start
) -> None:
    written: list[tuple[str | None, int]] = []
    progress = store.progress

    async def recording(video_id: str, attempt: int, event: Progress, resumed_step: int) -> bool:
        written.append((event.stage, event.step))
        return await progress(video_id, attempt, event, resumed_step)

    store.progress = recording  # type: ignore[assignment, method-assign]
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

    async def run(job: JobSpec) -> AsyncGenerator[Event, None]:
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

    store.progress = refusing  # type: ignore[assignment, method-assign]

    async def run(job: JobSpec) -> AsyncGenerator[Event, None]:
        yield Progress("denoise", 5, 8)
        raise lost()

    video_id = await create(store)
    start(run, max_attempts=1)
    job = await ended(store, video_id, "failed")
    assert (refused, job.resumed_step) == (1, 5)


async def test_a_run_ends_at_its_deadline(store: JobStore, storage: Storage, start: Start, clock: MovableClock) -> None:
    """The run ends at that moment, though the next poll is far away."""
    pipeline = FakePipeline(storage, gate=asyncio.Event(), stubborn=True)
    video_id = await create(store, deadline_s=60)
    start(pipeline, poll_s=300, lease_s=600)
    await until(lambda: running(store, video_id))
    clock.advance(60)
    job = await ended(store, video_id, "failed")
    assert (job.error_code, job.error_message) == ("deadline_exceeded", "Its deadline passed while it ran.")
    assert job.deadline_at is not None and job.completed_at is not None
    assert 0 <= job.completed_at - job.deadline_at < 200
    assert pipeline.ended == [video_id]
    await pipeline.late


async def test_a_video_that_is_there_in_time_is_kept(
    store: JobStore, storage: Storage, start: Start, clock: MovableClock
) -> None:
    """Its deadline passes while the store cannot be reached to record it."""
    complete = store.complete

    async def late(video_id: str, attempt: int, done: Done) -> bool:
        clock.advance(61)
        return await complete(video_id, attempt, done)

    store.complete = late  # type: ignore[method-assign]
    video_id = await create(store, deadline_s=60)
    start(FakePipeline(storage), lease_s=600)
    job = await ended(store, video_id, "completed")
    assert job.completed_at is not None and job.deadline_at is not None and job.completed_at > job.deadline_at


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


async def test_cancel_running(store: JobStore, storage: Storage, start: Start) -> None:
    pipeline = FakePipeline(storage, gate=asyncio.Event(), stubborn=True)
    video_id = await create(store)
    dispatcher = start(pipeline, poll_s=0.05)
    await until(lambda: running(store, video_id))
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
    await until(lambda: running(store, video_id))
    assert await store.delete(video_id)

    async def stopped() -> bool:
        return pipeline.ended == [video_id]

    await until(stopped)
    await pipeline.late
    await until(lambda: no_files(storage))
    assert await store.get(video_id) is None
