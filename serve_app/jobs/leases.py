"""What dispatchers do with jobs: lease them, report on them, and end them. The database's clock judges all leases.

Writes of a run name its attempt and answer whether they took effect; one that did not has been superseded, cancelled or
deleted, and its run should end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import ColumnElement, case, delete, func, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app import config
from serve_app.errors import JobFailed
from serve_app.events import Done, Progress
from serve_app.jobs import transitions
from serve_app.jobs.database import Database
from serve_app.jobs.keys import at_running_limit
from serve_app.jobs.tables import Garbage, Job, id_time

# Percent at which a stage begins and ends. Denoising takes nearly all of the time on every model and device.
_SPANS = {"encode": (0, 2), "denoise": (2, 92), "decode": (92, 99)}
# Rows that one sweep takes on, so that it never holds a transaction open for long.
_SWEEP = 100


def percent(progress: Progress) -> int:
    """Progress over all stages, 0 to 99."""
    low, high = _SPANS[progress.stage]
    return int(low + (high - low) * min(progress.step / max(progress.steps, 1), 1))


class Leases:
    """The dispatchers' half of a `JobStore`.

    Args:
        late_outputs_s: how long a run that was cut off may still store something, in seconds.
    """

    def __init__(self, database: Database, late_outputs_s: float) -> None:
        self._db = database
        self._late_outputs_s = late_outputs_s

    async def sweep(self, options: config.Dispatcher, *, reap: bool = True) -> None:
        """Fail what waits beyond its deadline, and put jobs whose lease ran out back into the queue.

        Args:
            reap: False leaves the leases alone.
        """
        async with self._db.write() as session:
            now = await self._db.clock(session)
            overdue = select(Job).where(Job.status == "queued", Job.deadline_at <= now).limit(_SWEEP)
            for job in await session.scalars(overdue.with_for_update(skip_locked=True)):
                message = "Its deadline passed while it waited."
                session.add_all(transitions.fail(job, now, "deadline_exceeded", message, self._late_outputs_s))
            if not reap:
                return
            expired = select(Job).where(Job.status == "in_progress", Job.lease_until < now).limit(_SWEEP)
            silent = JobFailed("lease_expired", "Whoever worked on this video fell silent.", retryable=True)
            for job in await session.scalars(expired.with_for_update(skip_locked=True)):
                session.add_all(transitions.attempt_failed(job, now, silent, 0, options, self._late_outputs_s))

    async def claim(self, owner: str, lease_s: float) -> Job | None:
        """Lease the job whose turn is next, or None.

        The order is by `turn`, the time of creation plus the patience of the job's class. So a job is only overtaken by
        one of a more urgent class that came at most (its own patience - the other's) after it; once it has waited its
        patience, nobody who came later goes first. Within a class it is first come, first served.

        Jobs of a key of which as many run as may are passed over. Dispatchers that claim at the same moment may exceed
        that by one each.
        """
        async with self._db.write() as session:
            now = await self._db.clock(session)
            next_id = (
                select(Job.id)
                .where(Job.status == "queued", Job.not_before <= now)
                .where(or_(Job.deadline_at.is_(None), Job.deadline_at > now))
                .where(Job.owner.not_in(at_running_limit()))
                .order_by(Job.turn, Job.id)
                .limit(1)
                .with_for_update(skip_locked=True)
                .scalar_subquery()
            )
            claimed = await session.scalars(
                update(Job)
                .where(Job.id == next_id, Job.status == "queued")
                .values(
                    status="in_progress",
                    attempt=Job.attempt + 1,
                    started_at=now,
                    lease_owner=owner,
                    lease_until=now + lease_s,
                )
                .returning(Job)
                .execution_options(synchronize_session=False, populate_existing=True)
            )
            return claimed.one_or_none()

    async def renew(self, held: Mapping[str, int], lease_s: float) -> dict[str, bool]:
        """Extend the leases on `held` (job id to attempt); the ids still held, each with `cancel_requested`."""
        if not held:
            return {}
        async with self._db.write() as session:
            now = await self._db.clock(session)
            rows = await session.execute(
                update(Job)
                .where(_held(held))
                .values(lease_until=now + lease_s)
                .returning(Job.id, Job.cancel_requested)
                .execution_options(synchronize_session=False)
            )
            return {row.id: row.cancel_requested for row in rows}

    async def check(self, held: Mapping[str, int]) -> dict[str, bool]:
        """What `renew` would answer, without writing."""
        if not held:
            return {}
        async with self._db.read() as session:
            rows = await session.execute(select(Job.id, Job.cancel_requested).where(_held(held)))
            return {row.id: row.cancel_requested for row in rows}

    async def progress(self, video_id: str, attempt: int, progress: Progress, resumed_step: int = 0) -> bool:
        """Record a step.

        Args:
            resumed_step: the denoising step that the attempt began at. One beyond all before forgives their failures;
                it is recorded here, while the attempt runs, because its dispatcher may not live to tell.
        """
        reached = percent(progress)
        began = self._db.now() if progress.stage == "denoise" else None
        further = Job.resumed_step < resumed_step
        async with self._db.write() as session:
            written = await session.execute(
                update(Job)
                .where(_held({video_id: attempt}))
                .values(
                    stage=progress.stage,
                    step=progress.step,
                    steps=progress.steps,
                    seconds_left=progress.seconds_left,
                    denoise_at=func.coalesce(Job.denoise_at, began),
                    progress=case((Job.progress < reached, reached), else_=Job.progress),
                    resumed_step=case((further, resumed_step), else_=Job.resumed_step),
                    failures=case((further, 0), else_=Job.failures),
                )
                .returning(Job.id)
                .execution_options(synchronize_session=False)
            )
            return written.one_or_none() is not None

    async def complete(self, video_id: str, attempt: int, done: Done) -> bool:
        """Record the video. Files of earlier attempts and saved states are removed."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            now = await self._db.clock(session)
            session.add_all(transitions.complete(job, now, done, self._late_outputs_s))
        return True

    async def fail(self, video_id: str, attempt: int, code: str, message: str) -> bool:
        """Record that there will be no video."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            now = await self._db.clock(session)
            session.add_all(transitions.fail(job, now, code, message, self._late_outputs_s))
        return True

    async def retry(
        self, video_id: str, attempt: int, error: JobFailed, options: config.Dispatcher, resumed_step: int = 0
    ) -> bool:
        """Record that an attempt, which began at `resumed_step`, failed: the job is tried again or fails.

        See `transitions.attempt_failed` for which, and when.
        """
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            now = await self._db.clock(session)
            late_outputs_s = self._late_outputs_s
            session.add_all(transitions.attempt_failed(job, now, error, resumed_step, options, late_outputs_s))
        return True

    async def release(self, video_id: str, attempt: int, *, delay_s: float = 0) -> bool:
        """Hand a job back that did nothing wrong; it keeps its place, and no failure is counted."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            now = await self._db.clock(session)
            session.add_all(transitions.requeue(job, now, delay_s, self._late_outputs_s))
        return True

    async def garbage(self, limit: int = 20) -> Sequence[Garbage]:
        """Storage folders that are due to be removed."""
        async with self._db.read() as session:
            now = await self._db.clock(session)
            query = select(Garbage).where(Garbage.due_at <= now).order_by(Garbage.due_at).limit(limit)
            return (await session.scalars(query)).all()

    async def forget_garbage(self, items: Sequence[Garbage]) -> None:
        """Strike off what has been removed."""
        async with self._db.write() as session:
            await session.execute(delete(Garbage).where(Garbage.id.in_([item.id for item in items])))

    async def _locked(self, session: AsyncSession, video_id: str, attempt: int | None = None) -> Job | None:
        if id_time(video_id) is None:
            return None
        query = select(Job).where(Job.id == video_id)
        if attempt is not None:
            query = query.where(_held({video_id: attempt}))
        return await session.scalar(query.with_for_update())


def _held(held: Mapping[str, int]) -> ColumnElement[bool]:
    """The rows that these attempts still own."""
    return (Job.status == "in_progress") & tuple_(Job.id, Job.attempt).in_(list(held.items()))
