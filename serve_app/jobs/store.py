"""The durable queue and history of jobs. The database owns a job's state; every process here is replaceable.

Knows nothing of Ray, HTTP or storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import func, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.config import Patience
from serve_app.errors import ServeAppError
from serve_app.jobs import transitions
from serve_app.jobs.database import Database
from serve_app.jobs.leases import Leases
from serve_app.jobs.tables import Job, id_time, new_id
from serve_app.request import Params, Urgency

_WHENEVER = Urgency()


class QueueFull(ServeAppError):
    """As many jobs wait as may wait."""


class JobStore(Leases):
    """Jobs in SQLite or PostgreSQL: what users do here, what dispatchers do in `Leases`.

    Args:
        url: a SQLAlchemy URL; the driver may be left out.
        late_outputs_s: how long a run that was cut off may still store something, in seconds.
        patience: of each class of jobs that are created here; the defaults if None.

    Raises:
        ConfigError: the URL cannot be read, or names another kind of database.
    """

    def __init__(self, url: str, late_outputs_s: float = 600, patience: Patience | None = None) -> None:
        super().__init__(Database(url), late_outputs_s)
        self._patience = patience or Patience()

    @property
    def database(self) -> Database:
        """The database that it is in, for other tables in there."""
        return self._db

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

    async def create(
        self,
        params: Params,
        model: str,
        urgency: Urgency = _WHENEVER,
        *,
        remixed_from: str | None = None,
        notify_email: str | None = None,
        max_queued: int | None = None,
    ) -> Job:
        """Put a job into the queue; see `claim` for its place.

        Raises:
            QueueFull: `max_queued` jobs wait already.
        """
        async with self._db.write() as session:
            if max_queued is not None and await self._count(session) >= max_queued:
                raise QueueFull(f"{max_queued} jobs wait already.")
            video_id, created_at = new_id()
            deadline_at = None
            if urgency.deadline_s is not None:
                # By the clock that will judge it: this host's may be off by more than somebody's deadline.
                deadline_at = await self._db.clock(session) + urgency.deadline_s
            job = Job(
                id=video_id,
                model=model,
                params=params.model_dump(),
                remixed_from=remixed_from,
                notify_email=notify_email,
                priority=urgency.priority,
                created_at=created_at,
                turn=created_at + getattr(self._patience, urgency.priority),
                deadline_at=deadline_at,
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
            session.add_all(transitions.forget(job, now, self._late_outputs_s))
            await session.delete(job)
        return True

    async def request_cancel(self, video_id: str) -> Job | None:
        """Cancel at once what waits, and ask the dispatcher to cancel what runs; None if there is no such job."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id)
            if job is not None and job.status == "queued":
                now = await self._db.clock(session)
                message = "Cancelled before it started."
                session.add_all(transitions.fail(job, now, "cancelled", message, self._late_outputs_s))
            elif job is not None and job.status == "in_progress":
                job.cancel_requested = True
        return job

    async def count_queued(self) -> int:
        """How many jobs wait."""
        async with self._db.read() as session:
            return await self._count(session)

    async def position(self, video_id: str) -> int | None:
        """Place in the queue, 1 being next; None if the job does not wait. Jobs that come later may still push in."""
        if id_time(video_id) is None:
            return None
        async with self._db.read() as session:
            turn = await session.scalar(select(Job.turn).where(Job.id == video_id, Job.status == "queued"))
            if turn is None:
                return None
            ahead = select(func.count()).where(Job.status == "queued", tuple_(Job.turn, Job.id) < (turn, video_id))
            return (await session.scalar(ahead) or 0) + 1

    async def _count(self, session: AsyncSession) -> int:
        return await session.scalar(select(func.count()).where(Job.status == "queued")) or 0
