"""How long jobs take, from what the last ones took. Nothing is said where nothing was measured.

Work is TFLOP, as `serve_app.wan.cost` counts them for the model that is served. A job's time has parts that do not
grow with it (encoding, decoding, the wait for a group), so its own is taken from jobs of like size where there are any.
A job whose work is not known is taken for an average one of those that were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.db.tables import Job

# Of the last jobs: enough to even out chance, few enough to follow a change of the hardware.
_RECENT = 50
# Work that differs by no more than this factor is of like size.
_LIKE = 4.0


@dataclass(frozen=True)
class Finished:
    """A completed job: its work, and when its only attempt began and ended."""

    work: float
    began: float
    ended: float


@dataclass(frozen=True)
class Pace:
    """What the last jobs say about the next ones."""

    finished: Sequence[Finished] = ()

    @property
    def work_per_s(self) -> float | None:
        """Work that all groups together did in a second in which they had any; None if none is known."""
        busy, reached = 0.0, float("-inf")
        for job in sorted(self.finished, key=lambda job: job.began):
            busy += max(job.ended - max(job.began, reached), 0)
            reached = max(reached, job.ended)
        return sum(job.work for job in self.finished) / busy if busy > 0 else None

    @property
    def typical_work(self) -> float:
        """Of a job; 0 if none is known."""
        return sum(job.work for job in self.finished) / max(len(self.finished), 1)

    @property
    def seconds_per_job(self) -> float | None:
        """How often a job ends while there is work; None if it is not known."""
        work_per_s = self.work_per_s
        return self.typical_work / work_per_s if work_per_s else None

    def seconds_left(self, ahead: float, work: float, begins_in_s: float = 0.0) -> float | None:
        """Until a job is done that waits.

        Args:
            ahead: work that comes before it, running or waiting.
            work: its own.
            begins_in_s: it may not begin sooner than this.
        """
        work_per_s = self.work_per_s
        if work_per_s is None:
            return None
        like = [job for job in self.finished if work / _LIKE <= job.work <= work * _LIKE] or self.finished
        own = work * sum(job.ended - job.began for job in like) / sum(job.work for job in like)
        return max(ahead / work_per_s, begins_in_s) + own


async def measure(session: AsyncSession) -> Pace:
    """From the jobs that completed last, without those that needed several attempts or whose work is not known."""
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
    """Of the jobs that run, what is left, and of those that wait in front of this one, counted as in `position`.

    Args:
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
