"""The queue by class, as `wan-serve status` shows it."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from serve_app.db.tables import Job
from serve_app.events import Done, Progress
from serve_app.jobs.store import JobStore
from serve_app.jobs.waiting import Waiting, waiting
from serve_app.request import Urgency
from serve_app.wan.cost import video_tflop
from tests.support.fakes import PARAMS
from tests.support.shapes import A14B


async def look(store: JobStore) -> Waiting:
    async with store.database.read() as session:
        return await waiting(session)


async def test_by_class(store: JobStore) -> None:
    assert await look(store) == Waiting({}, {}, 0, 0.0, None)
    done, running = [await store.create(PARAMS, "wan") for _ in range(2)]
    await store.claim("me", 60)
    await store.claim("me", 60)
    await store.complete(done.id, 1, Done({}, {}, 1))
    await store.progress(running.id, 1, Progress("denoise", 2, 4))
    async with store.database.write() as session:  # ten seconds
        times = {"started_at": 1e9, "completed_at": 1e9 + 10}
        await session.execute(update(Job).where(Job.id == done.id).values(times))
    for priority in ("interactive", "batch", "batch"):
        await store.create(PARAMS, "wan", Urgency(priority=priority))
    found, each = await look(store), video_tflop(A14B, PARAMS)
    assert found.jobs == {"interactive": 1, "batch": 2} and found.running == 1
    assert found.work["batch"] == pytest.approx(2 * each)
    progress = (await store.get(running.id)).progress
    assert found.running_work == pytest.approx(each * (100 - progress) / 100)
    assert found.seconds(1) == pytest.approx(30 + 10 * (100 - progress) / 100)
    assert found.seconds(2) == pytest.approx(found.seconds(1) / 2) and found.seconds(0) is None
