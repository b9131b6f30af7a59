"""The durable queue and history of jobs. The database owns a job's state; every process here is replaceable.

Knows nothing of Ray, HTTP or storage.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import func, select, text, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.config import Patience
from serve_app.errors import ServeAppError
from serve_app.jobs import transitions
from serve_app.jobs.database import Database
from serve_app.jobs.estimate import Pace, measure, work_ahead
from serve_app.jobs.keys import Keys, admit
from serve_app.jobs.leases import Leases
from serve_app.jobs.tables import Job, id_time, new_id
from serve_app.request import Params, Urgency

_WHENEVER = Urgency()


# Between two looks at the jobs that ended last, in seconds.
_PACE_S = 2.0


class QueueFull(ServeAppError):
    """As many jobs wait as may wait.

    Args:
        retry_after_s: when one fewer will, None if nothing is known.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class IdempotencyConflict(ServeAppError):
    """The owner used this idempotency key for another request."""


@dataclass(frozen=True)
class Idempotency:
    """A request's name, chosen by its client, and a digest of what it asks for: the same request makes one job however
    often it comes."""

    key: str
    digest: str


class JobStore(Leases):
    """Jobs in SQLite or PostgreSQL: what users do here, what dispatchers do in `Leases`.

    Args:
        url: a SQLAlchemy URL; the driver may be left out.
        late_outputs_s: how long a run that was cut off may still store something, in seconds.
        patience: of each class of jobs that are created here; the defaults if None.
        ranks: of the groups that they are made for, for GPU-seconds.

    Raises:
        ConfigError: the URL cannot be read, or names another kind of database.
    """

    def __init__(self, url: str, late_outputs_s: float = 600, patience: Patience | None = None, ranks: int = 1) -> None:
        super().__init__(Database(url), late_outputs_s)
        self.keys = Keys(self._db)
        self._patience = patience or Patience()
        self._ranks = ranks
        self._pace = Pace()
        self._pace_at = float("-inf")

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
        owner: str = "",
        idempotency: Idempotency | None = None,
        remixed_from: str | None = None,
        max_queued: int | None = None,
    ) -> Job:
        """Put a job into the queue; see `claim` for its place. Where the same request of the same owner was here
        before, its job is returned, whatever became of it.

        Raises:
            QueueFull: `max_queued` jobs wait already. OverLimit: as many of this owner do as may.
            IdempotencyConflict: another request of this owner had the same idempotency key.
        """
        await self.pace()  # before the transaction, which should be short
        request = (params, model, urgency, owner, idempotency, remixed_from, max_queued)
        try:
            return await self._create(*request)
        except IntegrityError:
            if idempotency is None:
                raise
            # Somebody else created the job between our look and our insert. Now we see it.
            return await self._create(*request)

    async def _create(
        self,
        params: Params,
        model: str,
        urgency: Urgency,
        owner: str,
        idempotency: Idempotency | None,
        remixed_from: str | None,
        max_queued: int | None,
    ) -> Job:
        async with self._db.write() as session:
            if idempotency is not None:
                known = select(Job).where(Job.owner == owner, Job.idempotency_key == idempotency.key)
                before = await session.scalar(known)
                if before is not None:
                    if before.request_digest != idempotency.digest:
                        raise IdempotencyConflict(f"Idempotency-Key {idempotency.key!r} was used for another request.")
                    return before
            video_id, created_at = new_id()
            # By the clock that will judge it: this host's may be off by more than somebody's deadline.
            now = await self._db.clock(session)
            await admit(session, owner, now)
            if max_queued is not None and await self._count(session) >= max_queued:
                raise QueueFull(f"{max_queued} jobs wait already.", self._pace.seconds_per_job)
            deadline_at = None if urgency.deadline_s is None else now + urgency.deadline_s
            job = Job(
                id=video_id,
                owner=owner,
                model=model,
                params=params.model_dump(),
                work=params.work,
                ranks=self._ranks,
                idempotency_key=None if idempotency is None else idempotency.key,
                request_digest=None if idempotency is None else idempotency.digest,
                remixed_from=remixed_from,
                priority=urgency.priority,
                created_at=created_at,
                turn=created_at + getattr(self._patience, urgency.priority),
                deadline_at=deadline_at,
            )
            session.add(job)
        return job

    async def get(self, video_id: str, owner: str | None = None) -> Job | None:
        """The job, or None. Another owner's is none; `owner` None stands for all of them."""
        if id_time(video_id) is None:
            return None
        async with self._db.read() as session:
            job = await session.get(Job, video_id)
        return job if job is not None and owner in (None, job.owner) else None

    async def list(
        self,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
        owner: str | None = None,
    ) -> tuple[Sequence[Job], bool]:
        """A page of at most `limit` jobs by age, and whether more follow. `after` is the last id of the page before.
        Those of one owner, or with None all.

        Raises:
            LookupError: `after` is no id.
        """
        key = tuple_(Job.created_at, Job.id)
        query = select(Job).limit(limit + 1)
        if owner is not None:
            query = query.where(Job.owner == owner)
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

    async def delete(self, video_id: str, owner: str | None = None) -> bool:
        """Forget a job and have its files removed; False if there is none. A run of it ends when it next reports."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id)
            if job is None or owner not in (None, job.owner):
                return False
            now = await self._db.clock(session)
            session.add_all(transitions.forget(job, now, self._late_outputs_s))
            await session.delete(job)
        return True

    async def request_cancel(self, video_id: str, owner: str | None = None) -> Job | None:
        """Cancel at once what waits, and ask the dispatcher to cancel what runs; None if there is no such job."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id)
            if job is None or owner not in (None, job.owner):
                return None
            if job.status == "queued":
                now = await self._db.clock(session)
                message = "Cancelled before it started."
                session.add_all(transitions.fail(job, now, "cancelled", message, self._late_outputs_s))
            elif job.status == "in_progress":
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

    async def seconds_left(self, job: Job) -> float | None:
        """Estimate of when a job is done that waits; None while nothing is known."""
        pace = await self.pace()
        if not pace.finished:
            return None
        async with self._db.read() as session:
            return pace.seconds_left(await work_ahead(session, job), job.work)

    async def pace(self) -> Pace:
        """How fast jobs are done at the moment, looked up every few seconds however many ask."""
        if time.monotonic() - self._pace_at >= _PACE_S:
            self._pace_at = time.monotonic()
            async with self._db.read() as session:
                self._pace = await measure(session)
        return self._pace

    async def _count(self, session: AsyncSession) -> int:
        return await session.scalar(select(func.count()).where(Job.status == "queued")) or 0
