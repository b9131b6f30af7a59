"""Less for those who allow it: decided once, at the first claim, in the database."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import update

from serve_app.config import DispatcherConfig
from serve_app.db.tables import DegradeState, Job
from serve_app.degrade import NEVER, Floor
from serve_app.dispatch.run import spec_of
from serve_app.errors import ConfigError, JobFailed
from serve_app.events import Done
from serve_app.jobs.degrading import Steering
from serve_app.jobs.store import JobStore
from serve_app.request import Params, Urgency
from serve_app.wan.cost import video_tflop
from tests.support.fakes import PARAMS
from tests.support.shapes import A14B

ASKED = PARAMS.model_copy(update={"width": 1280, "height": 720, "num_inference_steps": 40})
FLOOR = Floor(832, 480, 20)
STEERING = Steering({"interactive": 5, "standard": 10, "batch": 100}, most_groups=1, start_s=10)


async def claimed(store: JobStore, degrade: Any = FLOOR, owner: str = "", **urgency: Any) -> Job:
    job = await store.create(ASKED, "wan", Urgency(degrade=degrade, **urgency), owner=owner)
    found = await store.claim("me", 60)
    assert found is not None and found.id == job.id
    return found


async def test_decided_once_at_the_first_claim(store: JobStore) -> None:
    assert await store.degrade_level() == ("auto", 0)
    before = await claimed(store)
    assert before.params == ASKED.model_dump() and before.requested is None
    await store.set_degrade("3")
    job = await claimed(store)
    made = ASKED.model_copy(update={"width": 832, "height": 480, "num_inference_steps": 20})
    # What is made is a request of that size and seed, to the bit.
    assert spec_of(job).params == made and job.work == video_tflop(A14B, made)
    assert job.requested == {"width": 1280, "height": 720, "num_inference_steps": 40}
    assert job.warnings == [
        "The queue was long, so the video was made with 832x480 instead of 1280x720 and 20 steps instead of 40, "
        "as its request allows."
    ]
    await store.set_degrade("off")
    for one, expected in ((job, made), (before, ASKED)):  # retries keep it, and none is degraded later
        await store.set_degrade("3" if one is before else "off")
        await store.retry(one.id, 1, JobFailed("group_lost", "x", retryable=True), DispatcherConfig(retry_s=0))
        again = await store.claim("me", 60)
        assert again is not None and (again.id, again.attempt) == (one.id, 2)
        assert Params(**again.params) == expected


@pytest.mark.parametrize("degrade", [None, NEVER])
@pytest.mark.parametrize("level", ["0", "1", "2", "3"])
async def test_who_says_nothing_gets_what_they_asked_for(store: JobStore, degrade: Any, level: str) -> None:
    await store.set_degrade(level)
    for priority in ("interactive", "standard", "batch"):
        job = await claimed(store, degrade, priority=priority)
        assert job.params == ASKED.model_dump() and (job.requested, job.warnings) == (None, [])


async def test_what_a_key_agrees_to(store: JobStore) -> None:
    key, _ = await store.keys.create("x", ["create"], degrade={"min_steps": 10})
    await store.set_degrade("3")
    assert (await claimed(store, None, owner=key.id)).params["num_inference_steps"] == 20
    assert (await claimed(store, NEVER, owner=key.id)).params["num_inference_steps"] == 40
    assert (await claimed(store, Floor(64, 64), owner=key.id)).params["num_inference_steps"] == 40
    await store.keys.limit(key.id, {"degrade": None})
    assert (await claimed(store, None, owner=key.id)).params == ASKED.model_dump()


async def test_the_level_follows_the_queue(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PACE_S", "_FORECAST_S"):
        monkeypatch.setattr(f"serve_app.jobs.outlook.{name}", 0)

    async def pass_s(seconds: float) -> None:
        """Let time pass, for what the row remembers."""
        async with store._db.write() as session:
            row = DegradeState
            values = {name: getattr(row, name) - seconds for name in ("changed_at", "over_since", "under_since")}
            await session.execute(update(DegradeState).values(values))

    assert await store.steer(STEERING) == 0
    done = await store.create(PARAMS, "wan")
    await store.claim("me", 60)
    await store.complete(done.id, 1, Done({}, {}, 1))
    async with store._db.write() as session:
        await session.execute(update(Job).values(started_at=1e9, completed_at=1e9 + 10))
    jobs = [await store.create(PARAMS, "wan") for _ in range(3)]  # 30 s, and the target is 10
    levels = []
    for _ in range(6):
        levels.append(await store.steer(STEERING))
        await pass_s(30)
    assert levels == [0, 0, 1, 1, 1, 2]
    patient = Steering(STEERING.target_wait_s, most_groups=2, start_s=1000)
    for _ in range(6):
        assert await store.steer(patient) == 2  # another group comes first
        await pass_s(30)
    for job in jobs:
        await store.delete(job.id)
    levels = []
    for _ in range(4):
        levels.append(await store.steer(STEERING))
        await pass_s(1000)
    assert levels == [2, 2, 1, 1]
    await store.set_degrade("off")
    assert await store.steer(STEERING) == 0
    with pytest.raises(ConfigError, match=r"^MODE has value '4', expected one of auto, off, 0, 1, 2, 3$"):
        await store.set_degrade("4")
