"""The outlook of jobs: when they will be done, from what the last ones took and what waits or runs now."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.config import Priority, RetentionConfig
from serve_app.db.database import Database
from serve_app.db.tables import Job, Replicas
from serve_app.jobs.estimate import Pace, measure, work_ahead
from serve_app.jobs.forecast import Expected, Fleet, Upcoming, forecast
from serve_app.jobs.rows import Rows

# Seconds between two looks at the jobs that ended last and at the replicas.
_PACE_S = 2.0
# Seconds for which a forecast holds. Clients that follow videos ask several times a second.
_FORECAST_S = 1.0
# Waiting jobs that a forecast runs one by one; of those behind them only the work counts.
_IN_DETAIL = 64
# Seconds after which a number of replicas that nobody has repeated is no longer believed.
FLEET_S = 30.0
_COLUMNS = [getattr(Job, name) for name in Upcoming.__dataclass_fields__]


class Outlook(Rows):
    """The part of a `JobStore` that predicts. Forecasts are shared by all who ask this process within a second."""

    def __init__(self, database: Database, late_outputs_s: float, retention: RetentionConfig) -> None:
        super().__init__(database, late_outputs_s, retention)
        self._pipeline = "wan"
        self._plan = Fleet(1)
        """The fleet as the configuration has it at least, which counts until replicas are reported."""
        self._fleet = self._plan
        self._pace = Pace()
        self._pace_at = float("-inf")
        self._upcoming: list[Upcoming] = []
        self._more = False
        """True if more jobs wait than are in `_upcoming`."""
        self._sums: dict[tuple[str, str], tuple[int, float]] = {}
        """Number and TFLOP of the waiting jobs of each owner and class, if there are more than `_upcoming` has."""
        self._expected: dict[str, Expected] = {}
        self._forecast_at = float("-inf")

    async def pace(self) -> Pace:
        """Return how fast jobs are done at present, measured at most every few seconds."""
        if time.monotonic() - self._pace_at >= _PACE_S:
            self._pace_at = time.monotonic()
            async with self._db.read() as session:
                self._pace = await measure(session)
                self._fleet = await self._count(session)
        return self._pace

    async def seconds_left(self, job: Job) -> float | None:
        """Estimate the seconds until a job that waits or runs is done; None while that is not known."""
        expected = await self.expected(job)
        return None if expected is None else expected.seconds_left

    async def expected(self, job: Job) -> Expected | None:
        """Return what is expected of a job that waits or runs; None while that is not known."""
        pace = await self.pace()
        if not pace.known or job.finished:
            return None
        async with self._db.read() as session:
            now = await self._db.clock(session)
            if time.monotonic() - self._forecast_at >= _FORECAST_S:
                await self._look(session)
                self._expected = forecast(self._upcoming, pace, self._fleet, now)
            expected = self._expected.get(job.id)
            if expected is not None:
                return replace(expected, seconds_left=max(expected.done_at - now, 0.0))
            if job.status != "queued":  # it has just begun; its group tells more
                return None
            return await self._far_back(session, job, pace, now)

    async def predict(self, job: Job) -> Expected | None:
        """Return what is expected of a job that is about to be created; None while that is not known."""
        pace = await self.pace()
        if not pace.known:
            return None
        async with self._db.read() as session:
            now = await self._db.clock(session)
            if time.monotonic() - self._forecast_at >= _FORECAST_S:
                await self._look(session)
        if self._more and job.effective_deadline > self._upcoming[-1].effective_deadline:
            return self._after(job, self._ahead_of_new(job, pace), pace, now)
        return forecast([*self._upcoming, _upcoming(job)], pace, self._fleet, now).get(job.id)

    async def report_replicas(self, application: str, counts: Mapping[str, int]) -> None:
        """Note how many replicas of each deployment of an application run now; it holds for half a minute."""
        async with self._db.write() as session:
            now = await self._db.clock(session)
            for deployment, count in counts.items():
                await session.merge(Replicas(application=application, deployment=deployment, count=count, at=now))

    def _created(self, job: Job) -> None:
        """Count a job that was created here in the next predictions, which may come within the same second."""
        if not self._more:
            self._upcoming.append(_upcoming(job))
        count, work = self._sums.get((job.owner, job.priority), (0, 0.0))
        self._sums[job.owner, job.priority] = count + 1, work + (job.work or self._pace.typical_work)
        self._expected = {}

    async def _look(self, session: AsyncSession) -> None:
        """Read the jobs that run, and those that wait and come first."""
        self._forecast_at = time.monotonic()
        running = await session.execute(select(*_COLUMNS).where(Job.status == "in_progress"))
        first = select(Job.id).where(Job.status == "queued").order_by(Job.effective_deadline, Job.id)
        ids = (await session.scalars(first.limit(_IN_DETAIL + 1))).all()
        self._more = len(ids) > _IN_DETAIL
        waiting = await session.execute(
            select(*_COLUMNS).where(Job.id.in_(ids[:_IN_DETAIL])).order_by(Job.effective_deadline, Job.id)
        )
        self._upcoming = [Upcoming(**row._mapping) for row in (*running, *waiting)]
        work = func.sum(func.coalesce(Job.work, self._pace.typical_work))
        sums = select(Job.owner, Job.priority, func.count(), work).where(Job.status == "queued")
        found = await session.execute(sums.group_by(Job.owner, Job.priority)) if self._more else ()
        self._sums = {(owner, priority): (count, total) for owner, priority, count, total in found}

    async def _far_back(self, session: AsyncSession, job: Job, pace: Pace, now: float) -> Expected | None:
        """Return what is expected of a waiting job behind those that a forecast plays: by the work before it."""
        return self._after(job, await work_ahead(session, job, pace.typical_work), pace, now)

    def _ahead_of_new(self, job: Job, pace: Pace) -> float:
        """Return about the TFLOP before a job that is about to be created.

        Those are the rest of what runs, the owner's waiting jobs of its class and of more urgent ones, and as many of
        each other owner, who take turns.
        """
        running = [one for one in self._upcoming if one.status == "in_progress"]
        ahead = sum(
            (one.work or pace.typical_work) * (1 - one.step / one.params["num_inference_steps"])
            for one in running
            if one.stage != "decode"
        )
        classes: Sequence[str] = get_args(Priority)
        urgent = classes[: classes.index(job.priority) + 1]
        own = [self._sums.get((job.owner, name), (0, 0.0)) for name in urgent]
        turns = sum(count for count, _ in own) + 1
        others: dict[str, tuple[int, float]] = {}
        for (owner, _), (count, work) in self._sums.items():
            if owner != job.owner:
                before = others.get(owner, (0, 0.0))
                others[owner] = before[0] + count, before[1] + work
        ahead += sum(work for _, work in own)
        return ahead + sum(work * min(turns / count, 1.0) for count, work in others.values())

    def _after(self, job: Job, ahead: float, pace: Pace, now: float) -> Expected | None:
        """Return what is expected of a job after so much work of others."""
        rate, groups = pace.work_per_group_s, self._fleet.groups
        alone = forecast([replace(_upcoming(job), not_before=0.0)], pace, self._fleet, now).get(job.id)
        if rate is None or not groups or alone is None:
            return None
        left = max(ahead / (rate * groups), job.not_before - now) + alone.alone_s
        return Expected(now + left, alone.alone_s, left)

    async def _count(self, session: AsyncSession) -> Fleet:
        """Return the fleet with the numbers of replicas that were reported last, if that is not long ago."""
        now = await self._db.clock(session)
        rows = await session.execute(
            select(Replicas.deployment, Replicas.count).where(
                Replicas.application == self._pipeline, Replicas.at > now - FLEET_S
            )
        )
        counts = {deployment: count for deployment, count in rows}
        if not counts:
            return self._plan
        groups = sum(count for deployment, count in counts.items() if deployment.endswith("Denoiser"))
        return replace(self._plan, groups=groups, decoders=counts.get("Decoder", self._plan.decoders))


def _upcoming(job: Job) -> Upcoming:
    return Upcoming(**{name: getattr(job, name) for name in Upcoming.__dataclass_fields__})
