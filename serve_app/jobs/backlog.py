"""The work that waits or runs, by class, and how fast one group does it: all that autoscaling and degrading look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.config import Priority
from serve_app.db.tables import Job
from serve_app.jobs.estimate import Pace, measure
from serve_app.jobs.order import not_paused


@dataclass(frozen=True)
class Backlog:
    """The work at one moment.

    Attributes:
        work: TFLOP that is left, by priority class: of jobs that run, and of those that wait, are due and not paused.
        counts: number of these jobs, by class.
        denoising: number of jobs that groups hold.
        work_per_group_s: TFLOP per second of one group; None if not known.
        shares: seconds of an encoder and of a decoder for each second of a group, by the name of the stage.
    """

    work: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    denoising: int = 0
    work_per_group_s: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def jobs(self) -> int:
        """Number of all these jobs."""
        return sum(self.counts.values())

    def seconds_up_to(self, priority: Priority) -> tuple[float, float] | None:
        """Return the seconds of one group for the work of a class and all more urgent ones, and those of a mean job.

        None if the speed of a group is not known.
        """
        classes = get_args(Priority)
        names = classes[: classes.index(priority) + 1]
        work, jobs = sum(self.work.get(name, 0.0) for name in names), sum(self.counts.get(name, 0) for name in names)
        if not work or not jobs:
            return 0.0, 0.0
        if not self.work_per_group_s:
            return None
        return work / self.work_per_group_s, work / self.work_per_group_s / jobs


async def read_backlog(session: AsyncSession, now: float) -> Backlog:
    """Read the backlog.

    Args:
        session: an open session.
        now: the database's time.
    """
    pace = await measure(session)
    work = func.coalesce(Job.work, pace.typical_work)
    waits = (Job.status == "queued", Job.not_before <= now, not_paused())
    waiting = await session.execute(
        select(Job.priority, func.count(), func.sum(work)).where(*waits).group_by(Job.priority)
    )
    left = work * (100 - Job.progress) / 100.0
    running = await session.execute(
        select(Job.priority, func.count(), func.sum(left)).where(Job.status == "in_progress").group_by(Job.priority)
    )
    held = select(func.count()).where(Job.status == "in_progress", Job.stage == "denoise")
    total: dict[str, float] = {}
    counts: dict[str, int] = {}
    for priority, count, amount in (*waiting, *running):
        total[priority] = total.get(priority, 0.0) + (amount or 0.0)
        counts[priority] = counts.get(priority, 0) + count
    return Backlog(total, counts, await session.scalar(held) or 0, pace.work_per_group_s, _shares(pace))


def _shares(pace: Pace) -> dict[str, float]:
    measured = [job for job in pace.finished if job.timings]
    group_s = sum(job.cost_s for job in measured)
    if group_s <= 0:
        return {}
    decode_s = sum(job.timings.get("decode", 0.0) + job.timings.get("store", 0.0) for job in measured)
    return {"encoder": len(measured) * pace.encode_s / group_s, "decoder": decode_s / group_s}


def expected_wait_s(backlog: Backlog, groups: int, priority: Priority) -> float | None:
    """Return the seconds after which the last job of a class begins; None if not known.

    The work of the class and of all more urgent ones goes before, except for that of the job itself.

    Args:
        backlog: the work.
        groups: number of groups that do it.
        priority: the class.
    """
    found = backlog.seconds_up_to(priority)
    if found is None or not groups:
        return None if backlog.jobs else 0.0
    seconds, own_s = found
    return max(seconds / groups - own_s, 0.0)


def pressure(backlog: Backlog, groups: int, target_wait_s: Mapping[str, float]) -> float | None:
    """Return the expected wait as a share of its target, of the class for which that is largest; None if not known.

    Args:
        backlog: the work.
        groups: number of groups that do it.
        target_wait_s: seconds within which the jobs of a class should begin.
    """
    shares = []
    for priority in get_args(Priority):
        if backlog.work.get(priority):
            if (wait_s := expected_wait_s(backlog, groups, priority)) is None:
                return None
            shares.append(wait_s / target_wait_s[priority])
    return max(shares, default=0.0)
