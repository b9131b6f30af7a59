"""The depth of the queue by priority class, for metrics: jobs, their work, and how long the oldest has waited."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import case, func, select

from serve_app.db.tables import Job
from serve_app.jobs.estimate import Pace
from serve_app.jobs.order import due
from serve_app.jobs.rows import Rows


@dataclass(frozen=True)
class ClassDepth:
    """The jobs of one priority class that wait and could begin.

    Attributes:
        jobs: how many.
        work: TFLOP of their denoising. A job of unknown work counts as an average one.
        oldest_s: seconds that the oldest of them has waited.
    """

    jobs: int = 0
    work: float = 0.0
    oldest_s: float = 0.0


@dataclass(frozen=True)
class Depth:
    """The queue at one moment.

    Attributes:
        classes: by priority; without classes of which no job waits.
        running: jobs that dispatchers work on.
        running_work: TFLOP that they have before them.
    """

    classes: dict[str, ClassDepth] = field(default_factory=dict)
    running: int = 0
    running_work: float = 0.0

    def seconds(self, pace: Pace) -> float | None:
        """Return the seconds until all of it is done at this pace; None while that is not known."""
        work = self.running_work + sum(one.work for one in self.classes.values())
        return work / pace.work_per_s if pace.work_per_s else None


class QueueDepth(Rows):
    """The part of a `JobStore` that measures the queue as a whole."""

    async def depth(self, typical: float) -> Depth:
        """Measure the queue.

        Args:
            typical: TFLOP of a job whose own work is not known.
        """
        since = case((Job.start_at > Job.created_at, Job.start_at), else_=Job.created_at)
        work = func.coalesce(Job.work, typical)
        async with self._db.read() as session:
            now = await self._db.clock(session)
            waiting = (
                select(Job.priority, func.count(), func.sum(work), func.min(since))
                .where(due(now))
                .group_by(Job.priority)
            )
            left = func.coalesce(func.sum(work * (100 - Job.progress) / 100.0), 0.0)
            running = select(func.count(), left).where(Job.status == "in_progress")
            classes = {
                priority: ClassDepth(jobs, tflop, max(now - oldest, 0.0))
                for priority, jobs, tflop, oldest in await session.execute(waiting)
            }
            count, tflop = (await session.execute(running)).one()
        return Depth(classes, count, tflop)
