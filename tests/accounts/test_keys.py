"""Keys and their limits, on real databases."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import select, update

from serve_app.accounts.keys import DAY_S, KeyLimits, OverLimit
from serve_app.db.tables import Key, Usage
from serve_app.errors import JobFailed
from serve_app.events import Done, Progress
from serve_app.jobs.store import Idempotency, IdempotencyConflict, JobStore
from tests.support.clock import MovableClock
from tests.support.fakes import PARAMS
from tests.support.running import OPTIONS

DONE = Done({"video": "v"}, {"denoise": 10.0}, 1)


async def make(store: JobStore, **limits: Any) -> tuple[str, str]:
    key, text = await store.keys.create("alice", ["read", "create"], KeyLimits(**limits))
    return key.id, text


async def create(store: JobStore, owner: str, **more: Any) -> str:
    return (await store.create(PARAMS, "wan", owner=owner, **more)).id


async def used(store: JobStore) -> list[tuple[str, float]]:
    async with store._db.read() as session:
        return [(row.owner, row.gpu_seconds) for row in await session.scalars(select(Usage))]


async def test_only_the_secret_opens(store: JobStore) -> None:
    key_id, text = await make(store)
    other_id, other = await make(store)
    found = await store.keys.find(text)
    assert found is not None and (found.id, found.scopes) == (key_id, ["create", "read"])
    secret = text.rpartition("_")[2]
    assert secret not in found.digest and len(bytes.fromhex(secret)) == 32
    wrong = [
        *("", "wan_", key_id, text[:-1], text + "0", text.upper(), f"{text}\n", "wan_" + "0" * 16 + "_" + secret),
        f"wan_{other_id}_{secret}",  # another's secret
        f"wan_{key_id}_{found.digest}",  # who has read the database
        f"wan_{key_id}_{'0' * 64}",
    ]
    for text_ in wrong:
        assert await store.keys.find(text_) is None, text_
    assert await store.keys.revoke(key_id) and await store.keys.find(text) is None
    assert await store.keys.find(other) is not None
    assert not await store.keys.revoke("unknown")
    assert [(key.id, key.revoked_at is None, used) for key, used in await store.keys.list()] == [
        (key_id, False, 0),
        (other_id, True, 0),
    ]


async def test_what_another_owns_is_not_there(store: JobStore) -> None:
    mine, theirs = await create(store, "a"), await create(store, "b")
    for owner, video_id in (("a", mine), ("b", theirs), (None, mine), (None, theirs)):
        assert await store.get(video_id, owner) is not None
    assert await store.get(theirs, "a") is None
    assert await store.get(mine, "") is None
    assert await store.request_cancel(theirs, "a") is None
    assert await store.delete(theirs, "a") is False
    for owner, ids in (("a", [mine]), ("b", [theirs]), ("c", []), (None, [theirs, mine])):
        assert [job.id for job in (await store.list(owner=owner))[0]] == ids
    job = await store.get(theirs)
    assert job is not None and job.status == "queued"
    assert await store.delete(theirs, "b") and (await store.request_cancel(mine, None)) is not None


async def test_jobs_in_queue(store: JobStore) -> None:
    key_id, _ = await make(store, queued_jobs=2)
    # At once: the row of the key is locked, so that they are counted one by one.
    results = await asyncio.gather(*(create(store, key_id) for _ in range(6)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, OverLimit)]
    assert len(refused) == 4 and {error.code for error in refused} == {"queued_jobs"}, results
    await create(store, "somebody else")
    assert await store.claim("me", 60) is not None  # one of them runs, and waits no longer
    await create(store, key_id)
    assert await store.keys.limit(key_id, {"queued_jobs": None}) is not None
    await create(store, key_id)


async def test_jobs_running(store: JobStore) -> None:
    key_id, _ = await make(store, running_jobs=2)
    mine = [await create(store, key_id) for _ in range(4)]
    other = await create(store, "somebody else")
    claimed = [await store.claim("me", 60) for _ in range(4)]
    assert [job and job.id for job in claimed] == [mine[0], other, mine[1], None]
    # Passed over even where it has the fewest jobs running, and would be next.
    others = [await create(store, "somebody else") for _ in range(3)]
    claimed = [await store.claim("me", 60) for _ in range(4)]
    assert [job and job.id for job in claimed] == [*others, None]
    assert await store.complete(mine[0], 1, DONE)
    job = await store.claim("me", 60)
    assert job is not None and job.id == mine[2]
    assert await store.claim("me", 60) is None
    await store.keys.limit(key_id, {"running_jobs": 3})
    assert (await store.claim("me", 60)) is not None


async def test_queued_work(store: JobStore) -> None:
    """The work of waiting jobs counts, not their number; one always may wait."""
    job = await store.create(PARAMS, "wan")
    assert job.work
    key_id, _ = await make(store, queued_tflop=2.5 * job.work)
    for _ in range(2):
        await store.create(PARAMS, "wan", owner=key_id)
    with pytest.raises(OverLimit, match="TFLOP of this key wait") as over:
        await store.create(PARAMS, "wan", owner=key_id)
    assert over.value.code == "queued_tflop"
    await store.keys.limit(key_id, {"queued_tflop": None})
    await store.create(PARAMS, "wan", owner=key_id)
    small, _ = await make(store, queued_tflop=job.work / 2)
    await store.create(PARAMS, "wan", owner=small)


async def test_gpu_seconds(store: JobStore) -> None:
    store._ranks = 4
    key_id, _ = await make(store, gpu_seconds_per_day=100)
    for _ in range(3):
        video_id = await create(store, key_id)
        await store.claim("me", 60)
        await store.complete(video_id, 1, DONE)
        await store.delete(video_id)  # what was used stays used
    assert await used(store) == [(key_id, 40.0)] * 3
    with pytest.raises(OverLimit) as over:
        await create(store, key_id)
    assert over.value.code == "gpu_seconds" and "used 120 GPU-seconds" in over.value.message
    # When the oldest has gone, 80 are left, which is below 100.
    assert over.value.retry_after_s is not None and DAY_S - 60 < over.value.retry_after_s <= DAY_S
    assert [seconds for _, seconds in await store.keys.list()] == [120.0]
    async with store._db.write() as session:
        await session.execute(update(Usage).values(at=Usage.at - DAY_S))
    await create(store, key_id)
    assert await used(store) == []
    assert [seconds for _, seconds in await store.keys.list()] == [0.0]


async def test_who_pays_for_what_ends_early(store: JobStore, clock: MovableClock) -> None:
    """An owner who cancels pays for what ran; what we lost nobody pays for, and nothing is paid for twice."""
    key_id, _ = await make(store)
    ids = {}
    for end in ("cancelled", "deleted", "deadline", "broken", "lost", "encoding", "nobody's"):
        ids[end] = await create(store, "" if end == "nobody's" else key_id)
        await store.claim("me", 60)
        await store.progress(ids[end], 1, Progress("encode", 1, 1))
        if end != "encoding":
            await store.progress(ids[end], 1, Progress("denoise", 0, 4))
    clock.advance(0.05)
    for end in set(ids) - {"encoding"}:
        await store.progress(ids[end], 1, Progress("denoise", 2, 4))
    await store.fail(ids["encoding"], 1, "cancelled", "")
    await store.fail(ids["cancelled"], 1, "cancelled", "")
    await store.delete(ids["deleted"], key_id)
    await store.fail(ids["deadline"], 1, "deadline_exceeded", "")
    await store.fail(ids["broken"], 1, "internal_error", "")
    await store.retry(ids["lost"], 1, JobFailed("worker_lost", "", True), OPTIONS)
    await store.fail(ids["nobody's"], 1, "cancelled", "")
    async with store._db.read() as session:
        rows = {row.job_id: row.gpu_seconds for row in await session.scalars(select(Usage))}
    paid = {end: rows[video_id] for end, video_id in ids.items() if video_id in rows}
    assert set(paid) == {"cancelled", "deleted", "deadline"}
    assert all(0.04 < seconds < 30 for seconds in paid.values()), paid
    # The second attempt pays for itself alone.
    again = await store.claim("me", 60)
    assert again is not None and (again.id, again.denoise_at) == (ids["lost"], None)
    await store.complete(ids["lost"], 2, DONE)
    assert sorted(await used(store))[-1] == (key_id, 10.0) and len(await used(store)) == 4


async def test_the_same_request_makes_one_job(store: JobStore) -> None:
    other_gateway = JobStore(store._db._url.render_as_string(hide_password=False))
    await other_gateway.start()
    try:
        name = Idempotency("order-1", "digest")
        stores = [store, other_gateway] * 8
        ids = set(await asyncio.gather(*(create(one, "a", idempotency=name) for one in stores)))
        assert len(ids) == 1
        assert {await create(store, "b", idempotency=name)}.isdisjoint(ids)  # somebody else's order-1
        assert {await create(store, "a", idempotency=Idempotency("order-2", "digest"))}.isdisjoint(ids)
        with pytest.raises(IdempotencyConflict, match="'order-1' was used for another request"):
            await create(store, "a", idempotency=Idempotency("order-1", "other"))
        first = ids.pop()
        await store.claim("me", 60)
        await store.complete(first, 1, DONE)
        assert await create(store, "a", idempotency=name, max_queued=0) == first  # not a new job: no limit holds
        await store.delete(first)
        assert await create(store, "a", idempotency=name) != first
    finally:
        await other_gateway.close()


async def test_limits_of_a_key_that_is_gone_do_not_block(store: JobStore) -> None:
    """Handle calls may name any owner."""
    video_id = await create(store, "no key")
    job = await store.claim("me", 60)
    assert job is not None and (job.id, job.owner) == (video_id, "no key")
    assert await store.keys.limit("no key", {"queued_jobs": 1}) is None
    async with store._db.read() as session:
        assert (await session.scalars(select(Key))).all() == []
