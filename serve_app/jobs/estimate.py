"""Measurements of the jobs that completed last, from which the next ones are predicted.

Work is in TFLOP, as `serve_app.wan.cost` counts it for the served model. A job of unknown work counts as an average one
of those that were measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.db.tables import Job
from serve_app.engine.virtual_group import PassCost

# Number of latest jobs to measure: enough to even out chance, few enough to follow a change of the hardware.
RECENT = 50
# Predictions that must have come to an end before their errors are counted on.
_LEAST_RATIOS = 10
# Least seconds of a pass, so that a forecast always goes on.
_LEAST_S = 1e-9


@dataclass(frozen=True)
class Finished:
    """A completed job of one attempt.

    Attributes:
        work: TFLOP of its denoising.
        began: time at which its attempt began.
        ended: time at which it completed.
        group_s: its share of the seconds that its group spent on passes; None if not known.
        passes: its share of these passes. A pass that four equal samples share is a quarter for each.
        pixels: width x height x frames.
        timings: seconds of its stages.
    """

    work: float
    began: float
    ended: float
    group_s: float | None = None
    passes: float | None = None
    pixels: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def cost_s(self) -> float:
        """Seconds that its group worked for it; all of its time if that is not known."""
        return self.ended - self.began if self.group_s is None else self.group_s

    @property
    def other_s(self) -> float:
        """Seconds of its attempt in which no stage worked on it."""
        return max(self.ended - self.began - sum(self.timings.get(name, 0.0) for name in _STAGES), 0.0)


_STAGES = ("encode", "denoise", "decode", "store")


@dataclass(frozen=True)
class Pace:
    """The speed of the last jobs, and how right their predictions were.

    Attributes:
        finished: the jobs.
        ratios: actual seconds over predicted ones, of the jobs that had a prediction.
    """

    finished: Sequence[Finished] = ()
    ratios: Sequence[float] = ()

    @property
    def known(self) -> bool:
        """True if there is something to predict from."""
        return any(job.work > 0 and job.cost_s > 0 for job in self.finished)

    @property
    def work_per_s(self) -> float | None:
        """TFLOP per second of all groups together while they had work; None if not known."""
        busy, reached = 0.0, float("-inf")
        for job in sorted(self.finished, key=lambda job: job.began):
            busy += max(job.ended - max(job.began, reached), 0)
            reached = max(reached, job.ended)
        return sum(job.work for job in self.finished) / busy if busy > 0 else None

    @property
    def work_per_group_s(self) -> float | None:
        """TFLOP per second of one group while it works, by the mix of the last jobs; None if not known."""
        seconds = sum(job.cost_s for job in self.finished)
        return sum(job.work for job in self.finished) / seconds if seconds > 0 else None

    @property
    def typical_work(self) -> float:
        """Average TFLOP of a job; 0 if not known."""
        return sum(job.work for job in self.finished) / max(len(self.finished), 1)

    @property
    def seconds_per_job(self) -> float | None:
        """Seconds between the ends of two jobs while there is work; None if not known."""
        work_per_s = self.work_per_s
        return self.typical_work / work_per_s if work_per_s else None

    @property
    def pass_cost(self) -> PassCost | None:
        """Seconds of a pass; None if not known."""
        if not self.known:
            return None
        rows = [(job.passes or 0.0, job.work, job.cost_s) for job in self.finished if job.cost_s > 0 and job.work > 0]
        fixed_s, per_work_s = _fit(rows)
        return PassCost(max(fixed_s, _LEAST_S), per_work_s)

    @property
    def encode_s(self) -> float:
        """Seconds of a text encoder."""
        return _median([job.timings["encode"] for job in self.finished if "encode" in job.timings])

    @property
    def other_s(self) -> float:
        """Seconds of a job in which no stage works on it, without the waiting for one: less than most jobs have."""
        return min((job.other_s for job in self.finished if job.timings), default=0.0)

    @property
    def finish_s(self) -> float:
        """Seconds for which a job is finished after its decode; most of that work is done beside it."""
        other_s = self.other_s
        return _median([max(job.other_s - other_s, 0.0) for job in self.finished if job.timings.get("finish")])

    def decode_s(self, pixels: float) -> float:
        """Return the seconds of a decoder, files included.

        Args:
            pixels: width x height x frames.
        """
        rows = [
            (1.0, job.pixels, job.timings["decode"] + job.timings.get("store", 0.0))
            for job in self.finished
            if job.timings.get("decode", 0.0) > 0 and job.pixels > 0
        ]
        if not rows:
            return 0.0
        fixed_s, per_pixel_s = _fit(rows)
        return fixed_s + per_pixel_s * pixels

    @property
    def p90_factor(self) -> float:
        """The factor that nine of ten actual times stay below, times their predictions; 1 while it is not known."""
        ratios = sorted(self.ratios)
        return max(ratios[-(-9 * len(ratios) // 10) - 1], 1.0) if len(ratios) >= _LEAST_RATIOS else 1.0

    @property
    def errors(self) -> Sequence[float]:
        """Errors of the predictions, as shares of the actual times, the smallest first."""
        return sorted(abs(1 / ratio - 1) for ratio in self.ratios)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _fit(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return a and b, neither below 0, of y = a·x + b·z with the least squares of relative errors.

    Args:
        rows: x, z and y above 0 of each job.
    """
    scaled = [(x / y, z / y) for x, z, y in rows]
    xx, xz, zz = sum(x * x for x, _ in scaled), sum(x * z for x, z in scaled), sum(z * z for _, z in scaled)
    sx, sz = sum(x for x, _ in scaled), sum(z for _, z in scaled)
    determinant = xx * zz - xz * xz
    if determinant > 1e-6 * xx * zz:  # else all jobs are alike, and any split explains them
        a, b = (sx * zz - sz * xz) / determinant, (sz * xx - sx * xz) / determinant
        if a >= 0 and b >= 0:
            return a, b
        if b < 0 < xx:
            return sx / xx, 0.0
    return (0.0, sz / zz) if zz > 0 else (sx / xx, 0.0)


async def measure(session: AsyncSession) -> Pace:
    """Measure the jobs that completed last, except those that needed several attempts or whose work is not known."""
    rows = await session.execute(
        select(
            *(Job.work, Job.started_at, Job.completed_at, Job.group_s, Job.passes, Job.params, Job.timings),
            *(Job.created_at, Job.start_at, Job.predicted_s),
        )
        .where(Job.status == "completed", Job.attempt == 1)
        .order_by(Job.completed_at.desc())
        .limit(RECENT)
    )
    # Unknown work is left out here: the database might read its whole history to find as many that are known.
    finished, ratios = [], []
    for row in rows:
        if row.work is None or row.started_at is None or row.completed_at is None:
            continue
        # Without its share of passes, all of a job's time counts as its group's.
        timings = row.timings if row.group_s is not None else {}
        times = (row.started_at, row.completed_at, row.group_s, row.passes)
        finished.append(Finished(row.work, *times, pixels(row.params), timings))
        if row.predicted_s:
            ratios.append(max(row.completed_at - row.created_at, _LEAST_S) / row.predicted_s)
    return Pace(finished, ratios)


def pixels(params: dict[str, Any]) -> float:
    """Return width x height x frames of a job's parameters."""
    return float(params["width"] * params["height"] * params["num_frames"])


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
