"""The evidence about a canary, read from the jobs since its trial began and from the copies that it made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.db.rollouts import ServedPipeline, Shadow
from serve_app.db.tables import CANCELLED, Job
from serve_app.jobs.assignment import Rollout
from serve_app.jobs.verdict import Evidence

NOT_ITS_FAULT = frozenset({CANCELLED, "deadline_exceeded", "lease_expired", "store_failed", "deleted", "duplicate"})
"""Error codes of ends that a pipeline has no part in. All others count as its own failures."""

# Newest rows of each kind that are read, so that a long trial stays cheap.
_MOST = 500
# Amounts of work that differ by no more than this factor are similar, and jobs that a median is taken of at least.
_SIMILAR = 2.0
_LEAST = 3


@dataclass(frozen=True)
class Timed:
    """A completed job: its work in TFLOP, and the seconds of the attempt that made all of it."""

    work: float
    seconds: float

    @property
    def pace(self) -> float:
        """Seconds per TFLOP."""
        return self.seconds / self.work


async def gather(session: AsyncSession, served: Rollout, now: float) -> Evidence:
    """Return the evidence about the canary."""
    stable, canary = served.stable, served.canary
    assert stable is not None and canary is not None
    since = canary.since
    done = await _completed(session, Job.pipeline == canary.name, since)
    theirs = or_(Job.pipeline == stable.name, Job.pipeline.is_(None))
    others = await _completed(session, theirs, since)
    failed = await session.scalars(
        select(Job.id)
        .where(theirs, Job.status == "failed", Job.completed_at >= since, Job.error_code.not_in(NOT_ITS_FAULT))
        .limit(_MOST)
    )
    # A job that the stable pipeline fails as well is at fault itself.
    its_own = or_(Job.status != "failed", Job.error_code.in_(NOT_ITS_FAULT))
    tried = await session.scalars(
        select(Job.tried_at)
        .where(Job.tried_on == canary.name, Job.tried_at >= since, its_own)
        .order_by(Job.tried_at.desc())
        .limit(_MOST)
    )
    copies = (
        await session.scalars(
            select(Shadow)
            .where(Shadow.pipeline == canary.name, Shadow.at >= since, Shadow.outcome != "running")
            .order_by(Shadow.at.desc())
            .limit(_MOST)
        )
    ).all()
    outcomes = [(job.completed_at or 0.0, False) for job in done]
    outcomes += [(at, True) for at in tried if at is not None]
    outcomes += [(copy.at, copy.outcome == "failed") for copy in copies]
    stable_failed = len(failed.all())
    pace = slowdowns(_timed(done), _timed(others))
    # A copy makes way for every job, so its time says something only where there are none.
    pace += [] if canary.percent else _of_copies(copies)
    return Evidence(
        outcomes=[failed for _, failed in sorted(outcomes)],
        stable_ended=len(others) + stable_failed,
        stable_failed=stable_failed + sum(job.failures > 0 for job in others),
        slowdowns=pace,
        different=sum(copy.outcome == "different" for copy in copies),
        waits_s=None if canary.wanted_at is None else now - canary.wanted_at,
        age_s=now - since,
    )


async def has_begun(session: AsyncSession, canary: ServedPipeline) -> bool:
    """Return whether the canary denoises a job, or has ended one since it was given one.

    While it denoises, others may wait inside it for their turn.
    """
    at = canary.wanted_at
    if at is None:
        return True
    tried = and_(Job.tried_on == canary.name, Job.tried_at >= at)
    theirs = Job.pipeline == canary.name
    denoises = and_(Job.status == "in_progress", theirs, Job.denoise_at.is_not(None))
    completed = and_(Job.status == "completed", theirs, Job.completed_at >= at)
    copied = select(Shadow.job_id).where(Shadow.pipeline == canary.name, Shadow.at >= at, Shadow.outcome != "running")
    questions = [*(select(Job.id).where(sign) for sign in (denoises, completed, tried)), copied]
    for question in questions:
        if await session.scalar(question.limit(1)) is not None:
            return True
    return False


def slowdowns(ours: Sequence[Timed], theirs: Sequence[Timed]) -> list[float]:
    """Return each job's seconds per TFLOP over the median of similar jobs of the other pipeline.

    Jobs of similar work are compared where there are enough, because parts of a job's time do not grow with its work.
    """
    found = []
    for job in ours:
        similar = [one.pace for one in theirs if job.work / _SIMILAR <= one.work <= job.work * _SIMILAR]
        if len(similar) >= _LEAST:
            found.append(job.pace / median(similar))
    return found


def _timed(jobs: Sequence[Job]) -> list[Timed]:
    return [
        Timed(job.work, job.completed_at - job.started_at)
        for job in jobs
        if job.work
        and job.resumed_step == 0
        and job.started_at is not None
        and job.completed_at is not None
        and job.completed_at > job.started_at
    ]


def _of_copies(copies: Sequence[Shadow]) -> list[float]:
    return [
        copy.seconds / copy.source_seconds
        for copy in copies
        if copy.outcome != "failed" and copy.seconds and copy.source_seconds
    ]


async def _completed(session: AsyncSession, whose: ColumnElement[bool], since: float) -> Sequence[Job]:
    query = select(Job).where(Job.status == "completed", Job.completed_at >= since, whose)
    return (await session.scalars(query.order_by(Job.completed_at.desc()).limit(_MOST))).all()
