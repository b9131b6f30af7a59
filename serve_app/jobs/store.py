"""The durable queue and history of jobs. The database owns a job's state; every process here is replaceable.

Knows nothing of Ray, HTTP or storage. All leases are judged by the database's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from sqlalchemy import ColumnElement, case, delete, func, select, text, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.errors import ServeAppError
from serve_app.events import Done, Progress
from serve_app.jobs.database import Database
from serve_app.jobs.tables import Garbage, Job, id_time, new_id
from serve_app.request import Params

# Percent at which a stage begins and ends. Denoising takes nearly all of the time on every model and device.
_SPANS = {"encode": (0, 2), "denoise": (2, 92), "decode": (92, 99)}


class QueueFull(ServeAppError):
    """As many jobs wait as may wait."""


def percent(progress: Progress) -> int:
    """Progress over all stages, 0 to 99."""
    low, high = _SPANS[progress.stage]
    return int(low + (high - low) * min(progress.step / max(progress.steps, 1), 1))


class JobStore:
    """Jobs in SQLite or PostgreSQL.

    Writes of a run name its attempt and answer whether they took effect; one that did not has been superseded,
    cancelled or deleted, and its run should end.

    Args:
        url: a SQLAlchemy URL; the driver may be left out.
        late_outputs_s: how long a run that was cut off may still store something, in seconds.

    Raises:
        ConfigError: the URL cannot be read, or names another kind of database.
    """

    def __init__(self, url: str, late_outputs_s: float = 600) -> None:
        self._db = Database(url)
        self._late_outputs_s = late_outputs_s

    async def start(self) -> None:
        """Connect, and create the tables that are missing.

        Raises:
            ConfigError: the database cannot be opened.
        """
        await self._db.start()

    async def close(self) -> None:
        """Give every connection back."""
        await self._db.close()

    async def ping(self) -> None:
        """Ask the database for a sign of life; raises what the driver raises."""
        async with self._db.read() as session:
            await session.execute(text("SELECT 1"))

    # What users do

    async def create(
        self, params: Params, model: str, *, remixed_from: str | None = None, max_queued: int | None = None
    ) -> Job:
        """Put a job at the end of the queue.

        Raises:
            QueueFull: `max_queued` jobs wait already.
        """
        async with self._db.write() as session:
            if max_queued is not None and await self._count(session) >= max_queued:
                raise QueueFull(f"{max_queued} jobs wait already.")
            video_id, created_at = new_id()
            job = Job(
                id=video_id, model=model, params=params.model_dump(), created_at=created_at, remixed_from=remixed_from
            )
            session.add(job)
        return job

    async def get(self, video_id: str) -> Job | None:
        """The job, or None."""
        if id_time(video_id) is None:
            return None
        async with self._db.read() as session:
            return await session.get(Job, video_id)

    async def list(
        self, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> tuple[Sequence[Job], bool]:
        """A page of at most `limit` jobs by age, and whether more follow. `after` is the last id of the page before.

        Raises:
            LookupError: `after` is no id.
        """
        key = tuple_(Job.created_at, Job.id)
        query = select(Job).limit(limit + 1)
        if order == "asc":
            query = query.order_by(Job.created_at, Job.id)
        else:
            query = query.order_by(Job.created_at.desc(), Job.id.desc())
        if after is not None:
            since = id_time(after)
            if since is None:
                raise LookupError(after)
            query = query.where(key > (since, after) if order == "asc" else key < (since, after))
        async with self._db.read() as session:
            jobs = (await session.scalars(query)).all()
        return jobs[:limit], len(jobs) > limit

    async def delete(self, video_id: str) -> bool:
        """Forget a job and have its files removed; False if there is none. A run of it ends when it next reports."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id)
            if job is None:
                return False
            now = await self._db.clock(session)
            session.add(Garbage(prefix=f"videos/{job.id}", due_at=now))
            if job.attempt and (job.status != "completed" or job.attempt > 1):
                session.add(Garbage(prefix=f"videos/{job.id}", due_at=now + self._late_outputs_s))
            await session.delete(job)
        return True

    async def request_cancel(self, video_id: str) -> Job | None:
        """Cancel at once what waits, and ask the dispatcher to cancel what runs; None if there is no such job."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id)
            if job is not None and job.status == "queued":
                self._end(session, job, await self._db.clock(session), "cancelled", "Cancelled before it started.")
            elif job is not None and job.status == "in_progress":
                job.cancel_requested = True
        return job

    async def count_queued(self) -> int:
        """How many jobs wait."""
        async with self._db.read() as session:
            return await self._count(session)

    async def position(self, video_id: str) -> int | None:
        """Place in the queue, 1 being next; None if the job does not wait."""
        created_at = id_time(video_id)
        if created_at is None:
            return None
        ahead = select(func.count()).where(
            Job.status == "queued", tuple_(Job.created_at, Job.id) < (created_at, video_id)
        )
        async with self._db.read() as session:
            if await session.scalar(select(Job.status).where(Job.id == video_id)) != "queued":
                return None
            return (await session.scalar(ahead) or 0) + 1

    # What dispatchers do

    async def claim(self, owner: str, lease_s: float, max_attempts: int) -> Job | None:
        """Lease the oldest job that waits, or None. Jobs whose lease ran out join the queue again first."""
        async with self._db.write() as session:
            now = await self._db.clock(session)
            await self._reap(session, now, max_attempts)
            next_id = (
                select(Job.id)
                .where(Job.status == "queued", Job.not_before <= now)
                .order_by(Job.created_at, Job.id)
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

    async def progress(self, video_id: str, attempt: int, progress: Progress) -> bool:
        """Record a step."""
        reached = percent(progress)
        async with self._db.write() as session:
            written = await session.execute(
                update(Job)
                .where(_held({video_id: attempt}))
                .values(
                    stage=progress.stage,
                    step=progress.step,
                    steps=progress.steps,
                    seconds_left=progress.seconds_left,
                    progress=case((Job.progress < reached, reached), else_=Job.progress),
                )
                .returning(Job.id)
                .execution_options(synchronize_session=False)
            )
            return written.one_or_none() is not None

    async def complete(self, video_id: str, attempt: int, done: Done) -> bool:
        """Record the video. Files of earlier attempts are removed."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            job.status = "completed"
            job.completed_at = await self._db.clock(session)
            job.progress = 100
            job.step, job.seconds_left = job.steps, None
            job.outputs, job.timings, job.warnings = dict(done.outputs), dict(done.timings), [*done.warnings]
            job.size_bytes = done.size_bytes
            job.lease_owner = job.lease_until = None
            job.error_code = job.error_message = None
            for earlier in range(1, attempt):
                for due_at in (job.completed_at, job.completed_at + self._late_outputs_s):
                    session.add(Garbage(prefix=f"videos/{job.id}/{earlier}", due_at=due_at))
        return True

    async def fail(self, video_id: str, attempt: int, code: str, message: str) -> bool:
        """Record that there will be no video."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            self._end(session, job, await self._db.clock(session), code, message)
        return True

    async def retry(
        self, video_id: str, attempt: int, code: str, message: str, *, max_attempts: int, delay_s: float = 0
    ) -> bool:
        """Record that an attempt failed: the job waits `delay_s` and joins the queue, or fails if that was the last."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            now = await self._db.clock(session)
            self._attempt_failed(session, job, now, code, message, max_attempts, delay_s)
        return True

    async def release(self, video_id: str, attempt: int, *, delay_s: float = 0) -> bool:
        """Hand a job back that did nothing wrong; it keeps its place, and no failure is counted."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            self._requeue(session, job, await self._db.clock(session), delay_s)
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

    # Transitions, on a locked row

    async def _reap(self, session: AsyncSession, now: float, max_attempts: int) -> None:
        expired = select(Job).where(Job.status == "in_progress", Job.lease_until < now).limit(100)
        for job in await session.scalars(expired.with_for_update(skip_locked=True)):
            self._attempt_failed(
                session, job, now, "lease_expired", "Whoever worked on this video fell silent.", max_attempts, 0
            )
        await session.flush()

    def _attempt_failed(
        self, session: AsyncSession, job: Job, now: float, code: str, message: str, max_attempts: int, delay_s: float
    ) -> None:
        job.failures += 1
        if job.failures >= max_attempts:
            self._end(session, job, now, code, f"{message} Gave up after {job.failures} attempts.")
            return
        # Shown while it waits, so that a user who sees the second attempt also sees why.
        job.error_code, job.error_message = code, message
        self._requeue(session, job, now, delay_s)

    def _requeue(self, session: AsyncSession, job: Job, now: float, delay_s: float) -> None:
        if job.cancel_requested:
            self._end(session, job, now, "cancelled", "Cancelled while it ran.")
            return
        job.status = "queued"
        job.not_before = now + delay_s
        job.lease_owner = job.lease_until = job.started_at = job.stage = job.seconds_left = None
        job.step = job.steps = job.progress = 0

    def _end(self, session: AsyncSession, job: Job, now: float, code: str, message: str) -> None:
        job.status = "failed"
        job.completed_at = now
        job.error_code, job.error_message = code, message
        job.lease_owner = job.lease_until = job.seconds_left = None
        if job.attempt:
            for due_at in (now, now + self._late_outputs_s):
                session.add(Garbage(prefix=f"videos/{job.id}", due_at=due_at))

    # Plumbing

    async def _locked(self, session: AsyncSession, video_id: str, attempt: int | None = None) -> Job | None:
        if id_time(video_id) is None:
            return None
        query = select(Job).where(Job.id == video_id)
        if attempt is not None:
            query = query.where(_held({video_id: attempt}))
        return await session.scalar(query.with_for_update())

    async def _count(self, session: AsyncSession) -> int:
        return await session.scalar(select(func.count()).where(Job.status == "queued")) or 0


def _held(held: Mapping[str, int]) -> ColumnElement[bool]:
    """The rows that these attempts still own."""
    return (Job.status == "in_progress") & tuple_(Job.id, Job.attempt).in_(list(held.items()))
