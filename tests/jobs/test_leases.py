from __future__ import annotations

import asyncio

import pytest

from serve_app.events import Progress
from serve_app.jobs.leases import percent
from serve_app.jobs.store import JobStore
from tests.support.claiming import DONE, LOST, OPTIONS, claim, create, get, nothing_to_claim
from tests.support.clock import MovableClock


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (Progress("encode", 0, 1), 0),
        (Progress("encode", 1, 1), 2),
        (Progress("denoise", 0, 40), 2),
        (Progress("denoise", 20, 40), 47),
        (Progress("denoise", 40, 40), 92),
        (Progress("decode", 1, 1), 97),
        (Progress("finish", 0, 65), 97),
        (Progress("finish", 65, 65), 99),
        (Progress("decode", 0, 0), 92),
    ],
)
def test_percent(progress: Progress, expected: int) -> None:
    assert percent(progress) == expected


async def test_progress_never_falls_within_an_attempt(store: JobStore) -> None:
    job = await create(store)
    await claim(store)
    await store.progress(job.id, 1, Progress("decode", 0, 1))
    await store.progress(job.id, 1, Progress("denoise", 1, 4))
    assert (await get(store, job.id)).progress == 92


async def test_claims_are_first_come_first_served(store: JobStore) -> None:
    jobs = [await create(store, str(index)) for index in range(5)]
    assert [await store.position(job.id) for job in jobs] == [1, 2, 3, 4, 5]
    assert [(await claim(store)).id for _ in jobs] == [job.id for job in jobs]
    assert await store.position(jobs[0].id) is None
    assert await store.position("video_nonsense") is None


async def test_two_claimers_never_get_the_same_job(store: JobStore, store_url: str) -> None:
    stores = [store, JobStore(store_url), JobStore(store_url)]
    for other in stores[1:]:
        await other.start()
    expected = {(await create(store, str(index))).id for index in range(100)}

    async def claimer(mine: JobStore, owner: str) -> list[str]:
        got = []
        while (job := await mine.claim(owner, 60)) is not None:
            assert job.lease_owner == owner and job.attempt == 1
            got.append(job.id)
        return got

    claims = await asyncio.gather(*(claimer(stores[index % 3], f"owner-{index}") for index in range(6)))
    got = [video_id for claim in claims for video_id in claim]
    assert len(got) == 100 and set(got) == expected
    assert sum(bool(claim) for claim in claims) > 1
    for other in stores[1:]:
        await other.close()


async def test_late_writers_are_fenced(store: JobStore) -> None:
    job = await create(store)
    await claim(store, "first", lease_s=-1)
    second = await claim(store, "second")
    assert (second.id, second.attempt, second.interruptions) == (job.id, 2, 1)
    assert not await store.progress(job.id, 1, Progress("denoise", 4, 4))
    assert not await store.complete(job.id, 1, DONE)
    assert not await store.fail(job.id, 1, "x", "y")
    assert not await store.retry(job.id, 1, LOST, OPTIONS)
    assert not await store.release(job.id, 1)
    assert await store.renew({job.id: 1}, 60) == {}
    assert await store.still_held({job.id: 1}) == {}
    assert await store.still_held({job.id: 2}) == {job.id: False}
    now = await get(store, job.id)
    assert (now.status, now.progress, now.attempt) == ("in_progress", 0, 2)
    assert await store.complete(job.id, 2, DONE)
    assert not await store.complete(job.id, 2, DONE)
    assert not await store.fail(job.id, 2, "x", "y")


async def test_renewed_leases_do_not_expire(store: JobStore, clock: MovableClock) -> None:
    job = await create(store)
    await claim(store, lease_s=60)
    for _ in range(3):
        clock.advance(25)
        assert await store.renew({job.id: 1}, 60) == {job.id: False}
        assert await nothing_to_claim(store)
    clock.advance(61)
    assert (await claim(store, "other")).attempt == 2


async def test_attempts_are_bounded(store: JobStore) -> None:
    job = await create(store)
    for attempt in (1, 2, 3):
        assert (await claim(store)).attempt == attempt
        assert await store.retry(job.id, attempt, LOST, OPTIONS)
    failed = await get(store, job.id)
    assert (failed.status, failed.error_code, failed.failures) == ("failed", "rank_lost", 3)
    assert failed.error_message == "A rank was lost. Gave up after 3 attempts in a row."


async def test_expired_for_the_last_time(store: JobStore) -> None:
    job = await create(store)
    await claim(store, lease_s=-1)
    assert await nothing_to_claim(store, OPTIONS.model_copy(update={"max_interruptions": 1}))
    failed = await get(store, job.id)
    assert (failed.status, failed.error_code) == ("failed", "lease_expired")


async def test_the_second_attempt_comes_at_once_and_the_third_waits(store: JobStore, clock: MovableClock) -> None:
    job = await create(store)
    await claim(store)
    await store.progress(job.id, 1, Progress("denoise", 3, 4))
    options = OPTIONS.model_copy(update={"retry_s": 30})
    assert await store.retry(job.id, 1, LOST, options)
    waiting = await get(store, job.id)
    assert (waiting.status, waiting.progress, waiting.stage, waiting.error_code) == ("queued", 0, None, "rank_lost")
    assert (await claim(store)).attempt == 2
    assert await store.retry(job.id, 2, LOST, options)
    assert await nothing_to_claim(store)
    clock.advance(31)
    assert (await claim(store)).attempt == 3
    assert await store.complete(job.id, 3, DONE)
    assert (await get(store, job.id)).error_code is None


async def test_release_costs_no_attempt_and_no_place(store: JobStore) -> None:
    first, second = await create(store), await create(store)
    for attempt in range(1, 6):
        job = await claim(store)
        assert (job.id, job.attempt, job.failures) == (first.id, attempt, 0)
        assert await store.release(job.id, attempt)
    assert await store.position(second.id) == 2


async def test_cancelled_while_its_dispatcher_is_dead(store: JobStore) -> None:
    job = await create(store)
    await claim(store, lease_s=-1)
    await store.request_cancel(job.id)
    assert await nothing_to_claim(store)
    assert (await get(store, job.id)).error_code == "cancelled"


async def test_clocks_agree(store: JobStore) -> None:
    job = await create(store)
    claimed = await claim(store)
    assert claimed.started_at is not None
    assert abs(claimed.started_at - job.created_at) < 5
