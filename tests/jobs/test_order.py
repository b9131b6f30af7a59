"""Who goes next: classes, patience and deadlines, on real databases."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import get_args

import pytest

from serve_app import config
from serve_app.config import Patience, Priority
from serve_app.jobs.store import JobStore
from serve_app.jobs.tables import Job
from serve_app.request import Urgency
from tests.jobs.fakes import PARAMS

OPTIONS = config.Dispatcher()
PATIENCE = Patience(interactive=60, standard=900, batch=3600)
CLASSES: tuple[Priority, ...] = get_args(Priority)


@dataclass
class Clock:
    """Stands in for `new_id`: jobs are created when it says."""

    now: float = 1_700_000_000.0
    count: int = 0

    def __call__(self) -> tuple[str, float]:
        self.count += 1
        return f"video_{int(self.now * 1e6):014x}{self.count:024x}", self.now


@pytest.fixture
def clock(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> Clock:
    store._patience = PATIENCE
    clock = Clock()
    monkeypatch.setattr("serve_app.jobs.store.new_id", clock)
    return clock


async def create(store: JobStore, priority: Priority = "standard", deadline_s: float | None = None) -> str:
    return (await store.create(PARAMS, "wan", Urgency(priority=priority, deadline_s=deadline_s))).id


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
    assert (job.priority, job.deadline_at, job.turn) == ("batch", None, job.created_at + Patience().batch)


async def test_patience_ends(store: JobStore, clock: Clock) -> None:
    waiting = await create(store, "batch")
    clock.now += PATIENCE.batch - PATIENCE.interactive - 1
    before = await create(store, "interactive")
    clock.now += 2
    after = await create(store, "interactive")
    assert [await claimed(store) for _ in range(3)] == [before, waiting, after]


@pytest.mark.parametrize("seed", range(3))
async def test_nobody_is_overtaken_beyond_the_bound(store: JobStore, clock: Clock, seed: int) -> None:
    """A busy day: more comes in than goes out, mostly of the urgent classes."""
    draw = random.Random(seed)
    created: dict[str, tuple[float, Priority]] = {}
    waiting: list[str] = []
    for _ in range(120):
        clock.now += draw.expovariate(1 / 60)
        priority = draw.choices(CLASSES, (6, 3, 1))[0]
        video_id = await create(store, priority)
        created[video_id] = (clock.now, priority)
        waiting.append(video_id)
        if draw.random() < 0.7:
            first = await claimed(store)
            assert first is not None
            waiting.remove(first)
            at, priority = created[first]
            for other in waiting:
                since, own = created[other]
                lead = getattr(PATIENCE, own) - getattr(PATIENCE, priority)
                assert since >= at or at - since <= lead, "overtaken by one that came too late"
    places = {await store.position(video_id): video_id for video_id in waiting}
    assert [await claimed(store) for _ in waiting] == [places[index + 1] for index in range(len(waiting))]


async def test_a_job_handed_back_keeps_its_place(store: JobStore) -> None:
    first, second = await create(store), await create(store)
    assert await claimed(store) == first
    assert await store.release(first, 1)
    assert await store.position(second) == 2
    assert await claimed(store) == first


async def test_nothing_is_started_beyond_its_deadline(store: JobStore) -> None:
    late, sound = await create(store, deadline_s=0.1), await create(store, deadline_s=60)
    job = await get(store, late)
    assert job.deadline_at is not None and 0 <= job.deadline_at - job.created_at - 0.1 < 5
    await asyncio.sleep(0.15)
    assert await claimed(store) == sound  # before any sweep
    await store.sweep(OPTIONS)
    job = await get(store, late)
    assert (job.status, job.error_code, job.attempt) == ("failed", "deadline_exceeded", 0)
    assert job.error_message == "Its deadline passed while it waited."
    assert await store.garbage() == []


async def test_a_deadline_passes_between_two_attempts(store: JobStore) -> None:
    video_id = await create(store, deadline_s=0.2)
    assert await claimed(store) == video_id
    await asyncio.sleep(0.25)
    await store.sweep(OPTIONS)
    assert (await get(store, video_id)).status == "in_progress"  # its run ends by itself
    await store.release(video_id, 1)
    await store.sweep(OPTIONS)
    assert (await get(store, video_id)).error_code == "deadline_exceeded"
    assert sorted(item.prefix for item in await store.garbage()) == [f"samples/{video_id}", f"videos/{video_id}"]
