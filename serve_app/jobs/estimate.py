"""Estimates of how long jobs take, from the times of the last ones; there are none before the first job has completed.

Work is in TFLOP, as `serve_app.wan.cost` counts it for the served model. A job's time has parts that do not grow with
its work (encoding, decoding, the wait for a group), so it is estimated from jobs of similar work where there are any.
A job of unknown work counts as an average one of those that were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.db.tables import Job

# Number of latest jobs to measure: enough to even out chance, few enough to follow a change of the hardware.
_RECENT = 50
# Amounts of work that differ by no more than this factor are similar.
_SIMILAR = 4.0


@dataclass(frozen=True)
class Finished:
    """A completed job: its work in TFLOP, and the times at which its only attempt began and ended."""

    work: float
    began: float
    ended: float


@dataclass(frozen=True)
class Pace:
    """The speed of the last jobs, from which the next ones are estimated."""

    finished: Sequence[Finished] = ()

    @property
    def work_per_s(self) -> float | None:
        """TFLOP per second of all groups together while they had work; None if not known."""
        busy, reached = 0.0, float("-inf")
        for job in sorted(self.finished, key=lambda job: job.began):
            busy += max(job.ended - max(job.began, reached), 0)
            reached = max(reached, job.ended)
        return sum(job.work for job in self.finished) / busy if busy > 0 else None

    @property
    def typical_work(self) -> float:
        """Average TFLOP of a job; 0 if not known."""
        return sum(job.work for job in self.finished) / max(len(self.finished), 1)

    @property
    def seconds_per_job(self) -> float | None:
        """Seconds between the ends of two jobs while there is work; None if not known."""
        work_per_s = self.work_per_s
        return self.typical_work / work_per_s if work_per_s else None

    def seconds_left(self, ahead: float, work: float, begins_in_s: float = 0.0) -> float | None:
        """Return the seconds until a waiting job is done; None if not known.

        Args:
            ahead: work that comes before it, running or waiting.
            work: its own work.
            begins_in_s: seconds before which it may not begin.
        """
        work_per_s = self.work_per_s
        if work_per_s is None:
            return None
        similar = [job for job in self.finished if work / _SIMILAR <= job.work <= work * _SIMILAR] or self.finished
        own = work * sum(job.ended - job.began for job in similar) / sum(job.work for job in similar)
        return max(ahead / work_per_s, begins_in_s) + own


async def measure(session: AsyncSession) -> Pace:
    """Measure the jobs that completed last, except those that needed several attempts or whose work is not known."""
    rows = await session.execute(
        select(Job.work, Job.started_at, Job.completed_at)
        .where(Job.status == "completed", Job.attempt == 1)
        .order_by(Job.completed_at.desc())
        .limit(_RECENT)
    )
    # Unknown work is left out here: the database might read its whole history to find as many that are known.
    return Pace(
        [
            Finished(work, began, ended)
            for work, began, ended in rows
            if work is not None and began is not None and ended is not None
        ]
    )


async def work_ahead(session: AsyncSession, job: Job, typical: float) -> float:
    """Return the TFLOP before a waiting job: the rest of the running ones, and those that `position` counts before it.

    Args:
        session: an open session.
        job: the waiting job.
        typical: work of a job whose own is not known.
    """
    work = func.coalesce(Job.work, typical)
    running = select(func.sum(work * (100 - Job.progress) / 100.0)).where(Job.status == "in_progress")
    waits = Job.status == "queued"
    before = select(func.count(), func.sum(work)).where(
        waits, Job.owner == job.owner, tuple_(Job.effective_deadline, Job.id) < (job.effective_deadline, job.id)
    )
    count, own = (await session.execute(before)).one()
    nth = func.row_number().over(partition_by=Job.owner, order_by=(Job.effective_deadline, Job.id)).label("nth")
    others = select(work.label("work"), nth).where(waits, or_(Job.owner < job.owner, Job.owner > job.owner)).subquery()
    theirs = select(func.sum(others.c.work)).where(others.c.nth <= count + 1)
    return (await session.scalar(running) or 0.0) + (own or 0.0) + (await session.scalar(theirs) or 0.0)
