"""Rollouts: pipelines that share the jobs, and the canary's trial with its end.

Every change is one transaction that locks the pipelines' rows first, so that of two dispatchers which abort a canary at
once the second finds nothing left to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.config import CanaryConfig
from serve_app.db.notifications import new_event
from serve_app.db.rollouts import ServedPipeline
from serve_app.db.tables import Job, Key
from serve_app.errors import ServeAppError
from serve_app.jobs import transitions
from serve_app.jobs.assignment import Rollout, move, rollout
from serve_app.jobs.evidence import gather, has_begun
from serve_app.jobs.rows import Rows
from serve_app.jobs.verdict import Evidence, Verdict, judge

# Seconds for which a canary that could not be reached gets no job.
AWAY_S = 10.0
# Longest name of a pipeline: events carry it where they carry a video's id.
_LONGEST_NAME = 64
_UNFINISHED = ("queued", "in_progress")


class Rollouts(Rows):
    """The part of a `JobStore` about pipelines and canaries."""

    async def rollout(self) -> Rollout:
        """Return the pipelines that share the jobs."""
        async with self._db.read() as session:
            return await rollout(session)

    async def unfinished(self) -> dict[str, int]:
        """Count the jobs of each pipeline that wait after a first attempt, or run."""
        async with self._db.read() as session:
            query = select(Job.pipeline, func.count()).where(Job.status.in_(_UNFINISHED), Job.pipeline.is_not(None))
            return {name: count for name, count in await session.execute(query.group_by(Job.pipeline)) if name}

    async def seed(self, stable: str, shares: Mapping[str, float]) -> None:
        """Make the rows that a configuration asks for, where there are none. Rows that are there stay as they are.

        Args:
            stable: the name of the stable pipeline.
            shares: its share and that of a canary; nothing is seeded without them.
        """
        if not shares:
            return
        with suppress(IntegrityError):  # another dispatcher has just done it
            await self._seed(stable, shares)

    async def _seed(self, stable: str, shares: Mapping[str, float]) -> None:
        async with self._db.write() as session:
            served, now = await rollout(session, lock=True), await self._db.clock(session)
            if served.stable is None:
                session.add(_row(stable, "stable", now))
            for name, given in shares.items():
                if name != stable and served.find(name) is None and served.canary is None:
                    session.add(_row(name, "canary", now, given / sum(shares.values()) * 100))

    async def set_canary(self, name: str, percent: float, stable: str) -> None:
        """Begin the trial of a canary, or change its share.

        Args:
            name: the canary's application.
            percent: share of owners whose new jobs it gets, 0 to 100.
            stable: the stable pipeline, if the store knows none yet.

        Raises:
            ServeAppError: the name is that of the stable pipeline, or another canary is on trial.
        """
        if not 0 <= percent <= 100:
            raise ServeAppError(f"PERCENT has value {percent:g}, expected 0 to 100")
        _check_name(name)
        async with self._db.write() as session:
            served, now = await rollout(session, lock=True), await self._db.clock(session)
            if name == (stable if served.stable is None else served.stable.name):
                raise ServeAppError(f"NAME has value {name!r}, the stable pipeline's, expected another one's")
            if served.canary is not None and served.canary.name != name:
                raise ServeAppError(f"NAME has value {name!r}, expected {served.canary.name!r}, which is on trial")
            if served.stable is None:
                session.add(_row(stable, "stable", now))
            row = served.find(name)
            if row is None:
                session.add(_row(name, "canary", now, percent))
                return
            row.percent = percent
            if row.state != "canary":
                _enter(row, "canary", now)

    async def promote(self, name: str, stable: str) -> None:
        """Make a pipeline the stable one. The one before is retired: it gets no new jobs, and keeps those it has.

        Args:
            name: its application.
            stable: the stable pipeline until now, if the store knows none yet.
        """
        _check_name(name)
        async with self._db.write() as session:
            served, now = await rollout(session, lock=True), await self._db.clock(session)
            if served.stable is not None and served.stable.name == name:
                raise ServeAppError(f"NAME has value {name!r}, expected another than the stable pipeline's")
            await self._promote(session, served, name, now, stable)

    async def abort(self, name: str, reason: str) -> int:
        """Take a pipeline out of service, and hand its jobs, running ones too, to the stable one. Return how many.

        Raises:
            ServeAppError: it is neither a canary nor a retired pipeline.
        """
        async with self._db.write() as session:
            served, now = await rollout(session, lock=True), await self._db.clock(session)
            row = served.find(name)
            if row is None or row.state not in ("canary", "retired"):
                known = [one.name for one in served.rows if one.state in ("canary", "retired")]
                expected = " or ".join(map(repr, known)) or "a canary, and none is on trial"
                raise ServeAppError(f"NAME has value {name!r}, expected {expected}")
            return await self._abort(session, served, row, now, reason)

    async def leave_canary(self, video_id: str, attempt: int) -> bool:
        """Hand a job whose pipeline cannot be reached to the stable one; return False if that is its pipeline.

        The canary gets no job for a few seconds, and counts as waited for.
        """
        async with self._db.write() as session:
            served, now = await rollout(session, lock=True), await self._db.clock(session)
            job = await self._locked(session, video_id, attempt)
            if job is None or served.stable is None or job.pipeline in (None, served.stable.name):
                return False
            row = served.find(job.pipeline)
            if row is not None and row is served.canary:
                row.away_until = now + AWAY_S
                row.wanted_at = row.wanted_at or now
            self._hand_over(session, job, served, now)
        return True

    async def evidence(self) -> Evidence | None:
        """Return the evidence about the canary; None if there is none."""
        async with self._db.read() as session:
            served = await rollout(session)
            if served.canary is None or served.stable is None:
                return None
            return await gather(session, served, await self._db.clock(session))

    async def judge(self, options: CanaryConfig) -> tuple[str, Verdict] | None:
        """Judge the canary, and abort or promote it if that is the verdict.

        Returns:
            Its name and the verdict, if this call has ended the trial. Any number of dispatchers may call this.
        """
        async with self._db.read() as session:
            served = await rollout(session)
            left = [row.name for row in served.others if row.state == "aborted"]
            strays = bool(left) and await session.scalar(
                select(Job.id).where(Job.status.in_(_UNFINISHED), Job.pipeline.in_(left)).limit(1)
            )
        if strays:
            await self._fetch_strays()
        if served.canary is None or served.stable is None:
            return None
        async with self._db.write() as session:
            served, now = await rollout(session, lock=True), await self._db.clock(session)
            if served.canary is None or served.stable is None:
                return None
            for row in (served.stable, served.canary):
                await _learn_revision(session, row, served.canary.since)
            if await has_begun(session, served.canary):
                served.canary.wanted_at = None
            verdict = judge(await gather(session, served, now), options)
            name, served.canary.verdict = served.canary.name, verdict.reason
            if verdict.action == "abort":
                await self._abort(session, served, served.canary, now, verdict.reason)
            elif verdict.action == "promote" and options.auto_promote:
                await self._promote(session, served, name, now, served.stable.name)
            else:
                return None
        return name, verdict

    async def _fetch_strays(self) -> None:
        """Hand over jobs that were claimed for a pipeline just while it was aborted."""
        async with self._db.write() as session:
            served, now = await rollout(session, lock=True), await self._db.clock(session)
            for row in served.others:
                if row.state == "aborted":
                    await self._hand_all_over(session, served, row.name, now)

    async def _abort(self, session: AsyncSession, served: Rollout, row: ServedPipeline, now: float, why: str) -> int:
        _enter(row, "aborted", now)
        row.percent, row.reason = 0.0, why
        await _tell(session, "canary.aborted", row.name)
        return await self._hand_all_over(session, served, row.name, now)

    async def _promote(self, session: AsyncSession, served: Rollout, name: str, now: float, stable: str) -> None:
        before = served.stable
        if before is None:
            session.add(_row(stable, "retired", now))
        else:
            _enter(before, "retired", now)
            before.percent = 0.0
        row = served.find(name)
        if row is None:
            session.add(_row(name, "stable", now))
        else:
            _enter(row, "stable", now)
            row.percent, row.reason = 0.0, None
        await _tell(session, "canary.promoted", name)

    async def _hand_all_over(self, session: AsyncSession, served: Rollout, name: str, now: float) -> int:
        query = select(Job).where(Job.status.in_(_UNFINISHED), Job.pipeline == name).order_by(Job.id)
        jobs = (await session.scalars(query.with_for_update())).all()
        for job in jobs:
            self._hand_over(session, job, served, now)
        return len(jobs)

    def _hand_over(self, session: AsyncSession, job: Job, served: Rollout, now: float) -> None:
        """Put a job back to its place in the queue, for the stable pipeline. A run of it ends when it next reports."""
        if job.status == "in_progress":
            self._settle(session, job, now, transitions.requeue(job, now, 0, self._late_outputs_s))
        if not job.finished:
            move(job, served)


def _row(name: str, state: Literal["stable", "canary", "retired"], now: float, percent: float = 0.0) -> ServedPipeline:
    return ServedPipeline(name=name, state=state, since=now, percent=percent)


def _enter(row: ServedPipeline, state: Literal["stable", "canary", "retired", "aborted"], now: float) -> None:
    row.state, row.since = state, now
    row.wanted_at = row.away_until = None
    if state == "canary":
        row.reason = row.verdict = None


def _check_name(name: str) -> None:
    if not 0 < len(name) <= _LONGEST_NAME:
        raise ServeAppError(f"NAME has value {name!r}, expected the name of an application, 1 to {_LONGEST_NAME} long")


async def _learn_revision(session: AsyncSession, row: ServedPipeline, since: float) -> None:
    """Note the revision of the weights with which a pipeline made its latest video, if it made one since then."""
    latest = select(Job.revision).where(Job.status == "completed", Job.pipeline == row.name, Job.completed_at >= since)
    found = await session.scalar(latest.order_by(Job.completed_at.desc()).limit(1))
    row.revision = found or row.revision


async def _tell(session: AsyncSession, kind: Literal["canary.aborted", "canary.promoted"], name: str) -> None:
    """Make an event for each owner who may see everything: the holders of admin keys, and all if there are no keys."""
    keys = await session.scalars(select(Key).where(Key.revoked_at.is_(None)))
    for owner in ("", *(key.id for key in keys if "admin" in key.scopes)):
        session.add(new_event(owner, kind, name))
