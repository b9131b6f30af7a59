"""The gauges of queue, store and storage follow what they measure, and go away with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from sqlalchemy.exc import OperationalError

from serve_app.dispatch.gauges import Gauges
from serve_app.errors import JobFailed
from serve_app.jobs.depth import Depth
from serve_app.jobs.store import JobStore
from serve_app.metrics import catalog as metrics
from serve_app.storage import Storage
from tests.support.clock import MovableClock
from tests.support.fakes import FakePipeline, until
from tests.support.running import Start, create, ended


@pytest.fixture
async def gauges(store: JobStore, storage: Storage, clock: MovableClock) -> AsyncIterator[Gauges]:
    for gauge in (metrics.queued_jobs, metrics.store_reachable, metrics.storage_usable, metrics.paused):
        gauge.clear()
    gauges = Gauges(store, storage, clock)
    gauges.start()
    yield gauges
    await gauges.stop()


async def becomes(clock: MovableClock, seen: Callable[[], object]) -> None:
    """Wait until something is true, round after round."""

    async def look() -> object:
        clock.advance(5)
        return seen()

    await until(look)


async def test_the_queue_is_measured_again_and_again(store: JobStore, gauges: Gauges, clock: MovableClock) -> None:
    await becomes(clock, lambda: metrics.queued_jobs.value(priority="batch") == 0)
    await create(store, priority="batch")
    await store.pause()
    await becomes(clock, lambda: metrics.queued_jobs.value(priority="batch") == 1)
    await becomes(clock, lambda: metrics.paused.value() == 1)
    assert (metrics.oldest_wait_seconds.value(priority="batch") or 0) >= 0
    assert metrics.queued_jobs.value(priority="standard") == 0 and metrics.running_jobs.value() == 0
    await store.resume()
    await store.claim("me", 60)
    await becomes(clock, lambda: metrics.queued_jobs.value(priority="batch") == 0)
    await becomes(clock, lambda: metrics.running_jobs.value() == 1)


async def test_a_store_that_is_away_hides_the_queue(
    store: JobStore, gauges: Gauges, clock: MovableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await becomes(clock, lambda: metrics.store_reachable.value() == 1)

    async def away(typical: float) -> Depth:
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(store, "depth", away)
    await becomes(clock, lambda: metrics.store_reachable.value() == 0)
    assert metrics.queued_jobs.value(priority="batch") is None and metrics.paused.value() is None
    gauges.raise_if_ended()
    monkeypatch.undo()
    await becomes(clock, lambda: metrics.queued_jobs.value(priority="batch") == 0)


async def test_a_storage_that_refuses_is_not_usable(
    storage: Storage, gauges: Gauges, clock: MovableClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await becomes(clock, lambda: metrics.storage_usable.value() == 1)
    errors = metrics.storage_errors.value(call="check") or 0

    def ping() -> None:
        raise OSError("no")

    monkeypatch.setattr(storage._backend, "ping", ping)
    await becomes(clock, lambda: metrics.storage_usable.value() == 0)
    assert (metrics.storage_errors.value(call="check") or 0) > errors
    gauges.raise_if_ended()


async def test_a_loop_that_has_ended_is_noticed(gauges: Gauges, store: JobStore, clock: MovableClock) -> None:
    gauges.raise_if_ended()
    await becomes(clock, lambda: metrics.store_reachable.value() == 1)

    async def broken(typical: float) -> Depth:
        raise ZeroDivisionError

    store.depth = broken  # type: ignore[method-assign]

    def noticed() -> bool:
        try:
            gauges.raise_if_ended()
        except RuntimeError as error:
            return "queue-gauges" in str(error)
        return False

    await becomes(clock, noticed)


async def test_a_run_is_measured(store: JobStore, storage: Storage, start: Start) -> None:
    stages = {stage: metrics.stage_seconds.count(stage=stage, size="240p") for stage in metrics.STAGES}
    seconds, runs = metrics.gpu_seconds.value() or 0, metrics.job_run_seconds.count(size="240p")
    failed = metrics.attempts_failed.value(reason="group_lost") or 0
    video = await create(store)
    start(FakePipeline(storage, errors=[JobFailed("group_lost", "Gone.", retryable=True)]))
    await ended(store, video, "completed")

    async def measured() -> bool:
        return metrics.job_run_seconds.count(size="240p") == runs + 1

    await until(measured)
    counted = {stage for stage, n in stages.items() if metrics.stage_seconds.count(stage=stage, size="240p") == n + 1}
    assert counted == {"encode", "denoise", "decode"}  # the pipeline of this test tells no more
    assert (metrics.gpu_seconds.value() or 0) - seconds == pytest.approx(2.0)
    assert metrics.attempts_failed.value(reason="group_lost") == failed + 1
