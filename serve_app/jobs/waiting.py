"""The queue by class: how many jobs wait, how much work they are, and how many seconds that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.db.tables import Job

# Number of latest jobs whose seconds for a TFLOP count.
_RECENT = 50


@dataclass(frozen=True)
class Waiting:
    """Jobs that wait.

    Attributes:
        jobs: by class, how many.
        work: by class, their TFLOP; a job of unknown work counts as an average one.
        running: jobs that run.
        running_work: TFLOP that these still have before them.
        seconds_per_tflop: of one job while it runs; None before any job has completed.
    """

    jobs: Mapping[str, int]
    work: Mapping[str, float]
    running: int
    running_work: float
    seconds_per_tflop: float | None

    def seconds(self, at_once: int) -> float | None:
        """Return the seconds until all of it is done, if so many jobs run at once; None if that is not known."""
        if self.seconds_per_tflop is None or at_once < 1:
            return None
        return (sum(self.work.values()) + self.running_work) * self.seconds_per_tflop / at_once


async def waiting(session: AsyncSession) -> Waiting:
    """Look at the queue."""
    latest = (
        select(Job.work.label("work"), (Job.completed_at - Job.started_at).label("took"))
        .where(Job.status == "completed", Job.attempt == 1, Job.work.is_not(None))
        .order_by(Job.completed_at.desc())
        .limit(_RECENT)
        .subquery()
    )
    count, made, took = (
        await session.execute(select(func.count(), func.sum(latest.c.work), func.sum(latest.c.took)))
    ).one()
    typical = made / count if count else 0.0
    work = func.sum(func.coalesce(Job.work, typical))
    rows = await session.execute(
        select(Job.priority, func.count(), work).where(Job.status == "queued").group_by(Job.priority)
    )
    found = [(priority, number, float(tflop or 0.0)) for priority, number, tflop in rows]
    left = func.sum(func.coalesce(Job.work, typical) * (100 - Job.progress) / 100.0)
    running, rest = (await session.execute(select(func.count(), left).where(Job.status == "in_progress"))).one()
    return Waiting(
        {priority: number for priority, number, _ in found},
        {priority: tflop for priority, _, tflop in found},
        running,
        float(rest or 0.0),
        took / made if made else None,
    )
