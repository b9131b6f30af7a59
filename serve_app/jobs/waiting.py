"""The queue by class: how many jobs wait, how much work they are, and how many seconds that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.db.tables import Job
from serve_app.jobs.estimate import measure


@dataclass(frozen=True)
class Waiting:
    """Jobs that wait.

    Attributes:
        jobs: by class, how many.
        work: by class, their TFLOP; a job of unknown work counts as an average one.
        running: jobs that run.
        running_work: TFLOP that these still have before them.
        work_per_group_s: TFLOP per second of one group; None before any job has completed.
    """

    jobs: Mapping[str, int]
    work: Mapping[str, float]
    running: int
    running_work: float
    work_per_group_s: float | None

    def seconds(self, groups: int) -> float | None:
        """Return the seconds until so many groups have done all of it; None if that is not known."""
        if not self.work_per_group_s or groups < 1:
            return None
        return (sum(self.work.values()) + self.running_work) / self.work_per_group_s / groups


async def waiting(session: AsyncSession) -> Waiting:
    """Look at the queue."""
    pace = await measure(session)
    typical = pace.typical_work
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
        pace.work_per_group_s,
    )
