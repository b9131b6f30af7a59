"""The order of the queue: priority classes, ageing and deadlines, on real databases."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import get_args

import pytest
from sqlalchemy import update

from serve_app import config
from serve_app.config import Ageing, Priority
from serve_app.db.tables import Job
from serve_app.jobs.store import JobStore
from serve_app.request import Urgency
from tests.support.clock import MovableClock
from tests.support.fakes import PARAMS

OPTIONS = config.DispatcherConfig()
AGEING = Ageing(interactive=60, standard=900, batch=3600)
CLASSES: tuple[Priority, ...] = get_args(Priority)


@dataclass
class CreationTime:
    """A double of `new_id`, by which jobs are created at `now`."""

    now: float = 1_700_000_000.0
    count: int = 0

    def __call__(self) -> tuple[str, float]:
        self.count += 1
        return f"video_{int(self.now * 1e6):014x}{self.count:024x}", self.now


@pytest.fixture
def creation(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> CreationTime:
    store._ageing = AGEING
    creation = CreationTime()
    monkeypatch.setattr("serve_app.jobs.store.new_id", creation)
    return creation


async def create(store: JobStore, priority: Priority = "standard", deadline_s: float | None = None) -> str:
    return (await store.create(PARAMS, "wan", Urgency(priority=priority, deadline_s=deadline_s))).id


async def owned(store: JobStore, owner: str, count: int = 1, priority: Priority = "standard") -> list[str]:
    ids = [await create(store, priority) for _ in range(count)]
    async with store._db.write() as session:
        await session.execute(update(Job).where(Job.id.in_(ids)).values(owner=owner))
    return ids


async def owners(store: JobStore, count: int, *, end: bool = False) -> str:
    """Return the owners of the next claims, one letter each; `end` lets one job run at a time."""
    found = ""
    for _ in range(count):
        job = await store.claim("me", 60)
        assert job is not None
        found += job.owner
        if end:
            await store.fail(job.id, job.attempt, "x", "y")
    return found


async def claimed(store: JobStore) -> str | None:
    job = await store.claim("me", 60)
    return None if job is None else job.id


async def get(store: JobStore, video_id: str) -> Job:
    job = await store.get(video_id)
    assert job is not None
    return job


async def test_a_more_urgent_class_goes_first(store: JobStore) -> None:
    ids = {priority: await create(store, priority) for priority in reversed(CLASSES)}
    assert [await store.position(ids[priority]) for priority in CLASSES] == [1, 2, 3]
    assert [await claimed(store) for _ in CLASSES] == [ids[priority] for priority in CLASSES]
    job = await get(store, ids["batch"])
    assert (job.priority, job.deadline_at, job.effective_deadline) == ("batch", None, job.created_at + Ageing().batch)


async def test_ageing_ends(store: JobStore, creation: CreationTime) -> None:
    waiting = await create(store, "batch")
    creation.now += AGEING.batch - AGEING.interactive - 1
    before = await create(store, "interactive")
    creation.now += 2
    after = await create(store, "interactive")
    assert [await claimed(store) for _ in range(3)] == [before, waiting, after]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
async def test_nobody_is_overtaken_beyond_the_bound(store: JobStore, creation: CreationTime, seed: int) -> None:
    """A busy day: more comes in than goes out, mostly of the urgent classes."""
    draw = random.Random(seed)
    created: dict[str, tuple[float, Priority]] = {}
    waiting: list[str] = []
    for _ in range(120):
        creation.now += draw.expovariate(1 / 60)
        priority = draw.choices(CLASSES, (6, 3, 1))[0]
        video_id = await create(store, priority)
        created[video_id] = (creation.now, priority)
        waiting.append(video_id)
        if draw.random() < 0.7:
            first = await claimed(store)
            assert first is not None
            waiting.remove(first)
            at, priority = created[first]
            for other in waiting:
                since, own = created[other]
                lead = getattr(AGEING, own) - getattr(AGEING, priority)
                assert since >= at or at - since <= lead, "overtaken by one that came too late"
    places = {await store.position(video_id): video_id for video_id in waiting}
    assert [await claimed(store) for _ in waiting] == [places[index + 1] for index in range(len(waiting))]


async def test_a_job_handed_back_keeps_its_place(store: JobStore) -> None:
    first, second = await create(store), await create(store)
    assert await claimed(store) == first
    assert await store.release(first, 1)
    assert await store.position(second) == 2
    assert await claimed(store) == first


async def test_nothing_is_started_beyond_its_deadline(store: JobStore, clock: MovableClock) -> None:
    late, sound = await create(store, deadline_s=30), await create(store, deadline_s=60)
    job = await get(store, late)
    assert job.deadline_at is not None and 0 <= job.deadline_at - job.created_at - 30 < 5
    clock.advance(31)
    assert await claimed(store) == sound  # before any sweep
    await store.sweep(OPTIONS)
    job = await get(store, late)
    assert (job.status, job.error_code, job.attempt) == ("failed", "deadline_exceeded", 0)
    assert job.error_message == "Its deadline passed while it waited."
    assert await store.garbage() == []


async def test_a_deadline_passes_between_two_attempts(store: JobStore) -> None:
    video_id = await create(store, deadline_s=60)
    assert await claimed(store) == video_id
    async with store._db.write() as session:  # a deadline that has passed, however slow the machine is
        await session.execute(update(Job).where(Job.id == video_id).values(deadline_at=1.0))
    await store.sweep(OPTIONS)
    assert (await get(store, video_id)).status == "in_progress"  # its run ends by itself
    await store.release(video_id, 1)
    await store.sweep(OPTIONS)
    assert (await get(store, video_id)).error_code == "deadline_exceeded"
    assert sorted(item.prefix for item in await store.garbage()) == [f"samples/{video_id}", f"videos/{video_id}"]


async def test_a_flood_of_one_owner_keeps_no_other_from_being_next(store: JobStore) -> None:
    await owned(store, "a", 20, "interactive")
    assert await owners(store, 3) == "aaa"
    (late,) = await owned(store, "b", 1, "batch")
    assert await store.position(late) == 2
    assert await claimed(store) == late


async def test_a_free_place_goes_to_whom_has_least(store: JobStore) -> None:
    await owned(store, "a", 5)
    assert await owners(store, 3) == "aaa"
    await owned(store, "b", 5)
    await owned(store, "c", 5)
    assert await owners(store, 4) == "bcbc"  # among equals the earliest effective deadline
    assert await owners(store, 2) in ("bc", "cb")
    assert sorted(await owners(store, 2)) != ["a", "a"]


@pytest.mark.parametrize("ageing", [0, 900])
async def test_owners_take_turns_also_where_one_job_runs_at_a_time(store: JobStore, ageing: float) -> None:
    """The whole flood came before. Its earlier effective deadlines count only until the other's has passed."""
    store._ageing = Ageing(interactive=0, standard=ageing, batch=900)
    await owned(store, "a", 6)
    await owned(store, "b", 3)
    if ageing:
        assert await owners(store, 4, end=True) == "aaaa"
        async with store._db.write() as session:
            await session.execute(update(Job).values(effective_deadline=Job.effective_deadline - ageing))
        assert await owners(store, 4, end=True) == "baba"
    else:
        assert await owners(store, 8, end=True) == "ababab" + "aa"


async def test_positions_count_owners_taking_turns(store: JobStore) -> None:
    flood = await owned(store, "a", 10)
    few = await owned(store, "b", 2)
    assert [await store.position(video_id) for video_id in few] == [2, 4]
    assert [await store.position(video_id) for video_id in flood[:3]] == [2, 4, 5]


async def test_a_job_waits_for_its_start_and_its_ageing_counts_from_then(store: JobStore) -> None:
    async with store._db.read() as session:
        now = await store._db.clock(session)
    later = (await store.create(PARAMS, "wan", Urgency(priority="interactive", start_at=now + 60))).id
    passed = (await store.create(PARAMS, "wan", Urgency(start_at=1000))).id
    job = await get(store, later)
    assert (job.start_at, job.not_before, job.waits_since) == (now + 60, now + 60, now + 60)
    assert job.effective_deadline == now + 60 + Ageing().interactive
    assert (await get(store, passed)).effective_deadline == (await get(store, passed)).created_at + Ageing().standard
    assert await claimed(store) == passed
    assert await claimed(store) is None
    async with store._db.write() as session:
        await session.execute(update(Job).where(Job.id == later).values(not_before=Job.not_before - 61))
    assert await claimed(store) == later


async def test_nothing_begins_while_paused(store: JobStore) -> None:
    running, waiting = await create(store), await create(store)
    assert await claimed(store) == running
    assert await store.paused_since() is None
    assert await store.pause()
    assert not await store.pause()
    assert await store.paused_since() is not None
    assert await claimed(store) is None
    assert await store.running() == 1
    assert await create(store) is not None  # accepted all the same
    assert await store.renew({running: 1}, 60) == {running: False}
    assert await store.fail(running, 1, "x", "y")
    assert await store.running() == 0
    assert await store.resume()
    assert not await store.resume()
    assert await claimed(store) == waiting
    assert await store.counts() == {"failed": 1, "in_progress": 1, "queued": 1}
