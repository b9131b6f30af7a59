"""The durable queue and history of jobs. The database owns a job's state; every process here is replaceable.

Knows nothing of Ray, HTTP or storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from sqlalchemy import func, or_, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.config import Config, Patience, Retention
from serve_app.errors import ServeAppError
from serve_app.jobs import transitions
from serve_app.jobs.database import Database
from serve_app.jobs.leases import Leases
from serve_app.jobs.switches import Switches
from serve_app.jobs.tables import Job, id_time, new_id
from serve_app.jobs.upkeep import Upkeep
from serve_app.request import Params, Urgency

_WHENEVER = Urgency()


class QueueFull(ServeAppError):
    """As many jobs wait as may wait."""


class Announcer(Protocol):
    """Tells dispatchers, wherever they are, that jobs wait."""

    async def announce(self, video_ids: Sequence[str]) -> bool:
        """Whether they will hear of all of them. Takes no longer than a request may wait, and raises nothing."""


class JobStore(Leases, Upkeep, Switches):
    """Jobs in SQLite or PostgreSQL: what users do here, what dispatchers do in `Leases` and `Upkeep`, and operators in
    `Switches`.

    Args:
        url: a SQLAlchemy URL; the driver may be left out.
        late_outputs_s: how long a run that was cut off may still store something, in seconds.
        patience: of each class of jobs that are created here; the defaults if None.
        retention: of jobs that end here; the defaults if None.
        announcer: told of jobs that are created here. Without one, dispatchers find them when they next look.

    Raises:
        ConfigError: the URL cannot be read, or names another kind of database.
    """

    def __init__(
        self,
        url: str,
        late_outputs_s: float = 600,
        patience: Patience | None = None,
        retention: Retention | None = None,
        announcer: Announcer | None = None,
    ) -> None:
        super().__init__(Database(url), late_outputs_s, retention or Retention())
        self._patience = patience or Patience()
        self._announcer = announcer

    @classmethod
    def of(cls, config: Config, announcer: Announcer | None = None) -> JobStore:
        """The store that a configuration names."""
        late_outputs_s = config.dispatcher.late_outputs_s
        return cls(config.store_url, late_outputs_s, config.patience, config.retention, announcer)

    @property
    def database(self) -> Database:
        """The database that it is in, for other tables in there."""
        return self._db

    async def start(self) -> None:
        """Connect, and make the tables or bring them up to date.

        Raises:
            ConfigError: the database cannot be opened, or its tables are not of this version or an older one.
        """
        await self._db.start()

    async def close(self) -> None:
        """Give every connection back."""
        await self._db.close()

    @property
    def folder(self) -> Path | None:
        """Where the database lies, if this process writes it."""
        return self._db.folder

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
        """Put a job into the queue; see `claim` for its place. Once it is there, whoever listens is told.

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
                start_at=urgency.start_at,
                not_before=urgency.start_at or 0.0,
                deadline_at=deadline_at,
            )
            job.turn = job.waits_since + getattr(self._patience, urgency.priority)
            # One that is to begin later is announced when it is due, and one whose announcement gets lost once more.
            begins = job.waits_since <= created_at
            job.announced_at = created_at if begins else 0.0
            session.add(job)
        if self._announcer is not None and begins:
            await self._announcer.announce([job.id])
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
                self._settle(session, job, now, transitions.fail(job, now, "cancelled", message, self._late_outputs_s))
            elif job is not None and job.status == "in_progress":
                job.cancel_requested = True
        return job

    async def count_queued(self) -> int:
        """How many jobs wait."""
        async with self._db.read() as session:
            return await self._count(session)

    async def position(self, video_id: str) -> int | None:
        """Place in the queue, 1 being next; None if the job does not wait. Jobs that come later may still push in.

        Others' jobs are counted as if owners took turns from now on, whoever has the fewest running.
        """
        if id_time(video_id) is None:
            return None
        async with self._db.read() as session:
            place = select(Job.owner, Job.turn).where(Job.id == video_id, Job.status == "queued")
            if (row := (await session.execute(place)).one_or_none()) is None:
                return None
            waits = select(func.count()).where(Job.status == "queued")
            before = waits.where(Job.owner == row.owner, tuple_(Job.turn, Job.id) < (row.turn, video_id))
            own = (await session.scalar(before) or 0) + 1
            others = waits.where(or_(Job.owner < row.owner, Job.owner > row.owner)).group_by(Job.owner)
            return own + sum(min(count, own) for count in await session.scalars(others))

    async def _count(self, session: AsyncSession) -> int:
        return await session.scalar(select(func.count()).where(Job.status == "queued")) or 0
