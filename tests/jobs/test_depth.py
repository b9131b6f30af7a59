"""The depth of the queue: jobs, work and waits by class."""

from __future__ import annotations

import pytest

from serve_app.events import Done, Progress
from serve_app.jobs.depth import ClassDepth, Depth
from serve_app.jobs.estimate import Finished, Pace
from serve_app.jobs.store import JobStore
from serve_app.metrics import catalog as metrics
from serve_app.request import Urgency
from tests.support.fakes import PARAMS
from tests.support.running import create


async def test_depth_counts_what_waits_and_what_runs(store: JobStore) -> None:
    store._work_of = lambda params: 100.0 * params.num_inference_steps
    assert await store.depth(0.0) == Depth()
    await create(store, priority="interactive")
    await create(store, priority="batch")
    await create(store, priority="batch")
    later = (await store.create(PARAMS, "wan", Urgency(start_at=4e9))).id  # cannot begin yet
    depth = await store.depth(0.0)
    assert {name: (one.jobs, one.work) for name, one in depth.classes.items()} == {
        "interactive": (1, 400.0),
        "batch": (2, 800.0),
    }
    assert depth.running == 0 and all(0 <= one.oldest_s < 300 for one in depth.classes.values())
    job = await store.claim("me", 60)
    assert job is not None and job.priority == "interactive" and job.id != later
    await store.progress(job.id, 1, Progress("denoise", 2, 4))
    depth = await store.depth(0.0)
    assert [*depth.classes] == ["batch"] and depth.running == 1
    assert depth.running_work == pytest.approx(400 * (100 - 47) / 100)


async def test_unknown_work_counts_as_typical(store: JobStore) -> None:
    store._work_of = None
    await create(store)
    assert (await store.depth(7.0)).classes["standard"].work == 7.0


def test_seconds_follow_the_pace() -> None:
    depth = Depth({"batch": ClassDepth(2, 30.0, 1.0)}, 1, 10.0)
    assert depth.seconds(Pace()) is None
    assert depth.seconds(Pace([Finished(20.0, 0.0, 5.0)])) == 10.0


async def test_waits_and_ends_are_counted_once(store: JobStore) -> None:
    waits = metrics.job_wait_seconds.count(priority="batch")

    def ends(reason: str) -> float:
        return metrics.jobs_ended.value(reason=reason, priority="batch") or 0

    before = {reason: ends(reason) for reason in ("completed", "cancelled", "deleted", "out_of_memory")}
    created = metrics.jobs_created.value(priority="batch", size="240p") or 0
    ids = [await create(store, priority="batch") for _ in range(4)]
    assert metrics.jobs_created.value(priority="batch", size="240p") == created + 4
    for _ in range(3):
        job = await store.claim("me", 60)
        assert job is not None and job.attempt == 1
    assert metrics.job_wait_seconds.count(priority="batch") == waits + 3
    done = Done({}, {"denoise": 1.0}, 1)
    assert await store.complete(ids[0], 1, done) and not await store.complete(ids[0], 1, done)
    assert await store.fail(ids[1], 1, "out_of_memory", "Too large.")
    assert await store.delete(ids[2]) and await store.delete(ids[0])
    await store.request_cancel(ids[3])
    assert {reason: ends(reason) - number for reason, number in before.items()} == {
        "completed": 1,
        "cancelled": 1,
        "deleted": 1,
        "out_of_memory": 1,
    }


async def test_a_transaction_that_is_rolled_back_counts_nothing(store: JobStore) -> None:
    from serve_app.jobs.rows import count_end

    before = metrics.jobs_ended.value(reason="duplicate", priority="batch") or 0
    with pytest.raises(ZeroDivisionError):
        async with store.database.write() as session:
            count_end(session, "duplicate", "batch")
            raise ZeroDivisionError
    async with store.database.write() as session:
        await store.database.clock(session)
    assert (metrics.jobs_ended.value(reason="duplicate", priority="batch") or 0) == before
