"""The order of the queue in Python is that of the SQL: the same jobs begin in the same order, on SQLite."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, insert, select, update

from serve_app.accounts.keys import at_running_limit
from serve_app.db.tables import Job, Key
from serve_app.jobs.claim_order import ClaimOrder, Waiting
from serve_app.jobs.order import next_job
from serve_app.jobs.store import JobStore
from tests.support.fakes import PARAMS

OWNERS = ("a", "b", "c")
NOW = 1_700_000_000.0
JOBS = st.lists(
    st.tuples(
        st.sampled_from(OWNERS),
        st.integers(-50, 50),  # effective deadline, from now
        st.sampled_from((0, 0, 5)),  # seconds before which it may not begin
        st.sampled_from((None, None, -1, 3)),  # deadline
    ),
    max_size=10,
)
RUNNING = st.fixed_dictionaries({owner: st.integers(0, 2) for owner in OWNERS})
LIMITS = st.dictionaries(st.sampled_from(OWNERS), st.integers(1, 3), max_size=2)
ENDS = st.lists(st.booleans(), max_size=12)


@pytest.fixture
def sqlite(tmp_path: Path, empty_sqlite: Path) -> Iterator[tuple[asyncio.Runner, JobStore]]:
    """Yield a store without jobs, and what runs its calls."""
    shutil.copy(empty_sqlite, tmp_path / "jobs.db")
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    with asyncio.Runner() as runner:
        runner.run(store.start())
        yield runner, store
        runner.run(store.close())


def row(number: int, owner: str, **more: Any) -> dict[str, Any]:
    same = {"model": "wan", "params": PARAMS.model_dump(), "created_at": NOW, "step": 0, "saved_step": 0}
    return {"id": f"video_{number:014x}{number:024x}", "owner": owner, **same, **more}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JOBS, RUNNING, LIMITS, ENDS)
def test_the_same_order(
    sqlite: tuple[asyncio.Runner, JobStore],
    jobs: list[tuple[str, int, int, int | None]],
    running: dict[str, int],
    limits: dict[str, int],
    ends: list[bool],
) -> None:
    # Two that are equal in all that counts have no order of their own.
    deadlines = [NOW + deadline + nth / 100 for nth, (_, deadline, _, _) in enumerate(jobs)]
    waiting = [
        Waiting(row(nth, owner)["id"], owner, at, NOW + begins if begins else 0.0, None if end is None else NOW + end)
        for nth, ((owner, _, begins, end), at) in enumerate(zip(jobs, deadlines, strict=True))
    ]
    served = {owner: NOW - 100 - nth for nth, owner in enumerate(OWNERS) if running[owner]}
    order = ClaimOrder(limits, running, served)
    for one in waiting:
        order.add(one)

    async def compare() -> None:
        async with store._db.write() as session:
            for table in (Job, Key):
                await session.execute(delete(table))
            for owner, limit in limits.items():
                key = {"id": owner, "digest": "", "name": "", "scopes": [], "created_at": NOW}
                await session.execute(insert(Key).values(running_jobs=limit, **key))
            rows = [
                row(nth, one.owner, effective_deadline=one.effective_deadline, not_before=one.not_before)
                | {"deadline_at": one.deadline_at}
                for nth, one in enumerate(waiting)
            ]
            rows += [
                row(1000 + 10 * nth + count, owner, status="in_progress", started_at=served[owner])
                | {"effective_deadline": NOW}
                for nth, owner in enumerate(OWNERS)
                for count in range(running[owner])
            ]
            for values in rows:
                session.add(Job(**values))
            await session.flush()
            limited = set(await session.scalars(at_running_limit()))
            assert limited == {o for o, limit in limits.items() if running[o] and running[o] >= limit}
            for nth in range(len(jobs) + 1):
                now = NOW + nth
                expected = order.begin_next(now)
                found = await session.scalar(select(Job.id).where(Job.id == next_job(now).scalar_subquery()))
                assert found == (None if expected is None else expected.id)
                if expected is None:
                    continue
                start = update(Job).where(Job.id == found).values(status="in_progress", started_at=now)
                await session.execute(start)
                if nth < len(ends) and ends[nth]:
                    await session.execute(update(Job).where(Job.id == found).values(status="completed"))
                    order.ended(expected.owner)

    runner, store = sqlite
    runner.run(compare())


def test_a_thousand_owners_are_no_burden() -> None:
    """The order of many is found, whatever the owners: each once before any twice."""
    order = ClaimOrder()
    for nth in range(2000):
        order.add(Waiting(f"{nth:05d}", str(nth % 1000), float(nth % 1000)))
    first = [order.begin_next(5000.0) for _ in range(10)]
    assert [one.owner for one in first if one] == [str(nth) for nth in range(10)]
    assert len(order) == 1990
