"""The durable queue and history of jobs. The database owns a job's state; every process here is replaceable.

Knows nothing of Ray, HTTP or storage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.accounts.keys import Keys, admit
from serve_app.config import Ageing, Config, RetentionConfig
from serve_app.db.database import Database
from serve_app.db.tables import CANCELLED, Job, new_id
from serve_app.errors import ServeAppError
from serve_app.jobs import transitions
from serve_app.jobs.leases import Leases
from serve_app.jobs.maintenance import Maintenance
from serve_app.jobs.queries import Queries
from serve_app.jobs.upkeep import Upkeep
from serve_app.request import Params, Urgency

WorkOf = Callable[[Params], float]
"""Returns the TFLOP that the denoising of a video takes."""

_WHENEVER = Urgency()


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


class Announcer(Protocol):
    """Tells dispatchers, wherever they are, that jobs wait."""

    async def announce(self, video_ids: Sequence[str]) -> bool:
        """Whether they will hear of all of them. Takes no longer than a request may wait, and raises nothing."""


class JobStore(Queries, Leases, Upkeep, Maintenance):
    """Jobs in SQLite or PostgreSQL: what users do here, what dispatchers do in `Leases` and `Upkeep`, and operators in
    `Maintenance`.

    Args:
        url: a SQLAlchemy URL; the driver may be left out.
        late_outputs_s: how long a run that was cut off may still store something, in seconds.
        ageing: of each class of jobs that are created here; the defaults if None.
        retention: of jobs that end here; the defaults if None.
        announcer: told of jobs that are created here. Without one, dispatchers find them when they next look.
        ranks: of the groups that they are made for, for GPU-seconds.
        work_of: TFLOP that the denoising of a video takes, for estimates. Without it the jobs that are created here
            have no known work.

    Raises:
        ConfigError: the URL cannot be read, or names another kind of database.
    """

    def __init__(
        self,
        url: str,
        late_outputs_s: float = 600,
        ageing: Ageing | None = None,
        retention: RetentionConfig | None = None,
        announcer: Announcer | None = None,
        ranks: int = 1,
        work_of: WorkOf | None = None,
    ) -> None:
        super().__init__(Database(url), late_outputs_s, retention or RetentionConfig())
        self.keys = Keys(self._db)
        self._ageing = ageing or Ageing()
        self._announcer = announcer
        self._ranks = ranks
        self._work_of = work_of

    @classmethod
    def of(cls, config: Config, announcer: Announcer | None = None, work_of: WorkOf | None = None) -> JobStore:
        """The store that a configuration names.

        Raises:
            ConfigError: it would lie in a folder that cannot be made or written to.
        """
        if not config.store.url:
            config.make_home()
        return cls(
            config.store_url,
            config.dispatcher.late_outputs_s,
            config.ageing,
            config.retention,
            announcer,
            config.denoiser.parallel.size,
            work_of,
        )

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
        owner: str = "",
        idempotency: Idempotency | None = None,
        remixed_from: str | None = None,
        notify_email: str | None = None,
        warnings: Sequence[str] = (),
        max_queued: int | None = None,
    ) -> Job:
        """Put a job into the queue; see `claim` for its place. Once it is there, whoever listens is told.

        Where the same request of the same owner was here before, its job is returned, whatever became of it.

        Args:
            warnings: sentences for the user that can be said before any work.

        Raises:
            QueueFull: `max_queued` jobs wait already. OverLimit: as many of this owner do as may.
            IdempotencyConflict: another request of this owner had the same idempotency key.
        """
        await self.pace()  # before the transaction, which should be short
        job = Job(
            owner=owner,
            model=model,
            params=params.model_dump(),
            work=None if self._work_of is None else self._work_of(params),
            ranks=self._ranks,
            idempotency_key=None if idempotency is None else idempotency.key,
            request_digest=None if idempotency is None else idempotency.digest,
            remixed_from=remixed_from,
            notify_email=notify_email,
            warnings=[*warnings],
            priority=urgency.priority,
            start_at=urgency.start_at,
            not_before=urgency.start_at or 0.0,
        )
        try:
            before = await self._add(job, urgency.deadline_s, max_queued)
        except IntegrityError:
            # Somebody else created the job between our look and our insert. Now we see it.
            before = None if idempotency is None else await self.known(owner, idempotency)
            if before is None:
                raise
        if before is not None:
            return before
        if self._announcer is not None and job.announced_at:
            await self._announcer.announce([job.id])
        return job

    async def _add(self, job: Job, deadline_s: float | None, max_queued: int | None) -> Job | None:
        """Give a job its id and times and store it, unless its request was here before: then that one's job."""
        async with self._db.write() as session:
            if job.idempotency_key is not None:
                before = await _known(session, job.owner, job.idempotency_key, job.request_digest)
                if before is not None:
                    return before
            job.id, job.created_at = new_id()
            # By the clock that will judge it: this host's may be off by more than somebody's deadline.
            now = await self._db.clock(session)
            await admit(session, job.owner, now)
            if max_queued is not None and await self._count(session) >= max_queued:
                raise QueueFull(f"{max_queued} jobs wait already.", self._pace.seconds_per_job)
            job.deadline_at = None if deadline_s is None else now + deadline_s
            job.effective_deadline = job.waits_since + getattr(self._ageing, job.priority)
            # One that is to begin later is announced when it is due, and one whose announcement gets lost once more.
            job.announced_at = job.created_at if job.waits_since <= job.created_at else 0.0
            session.add(job)
        return None

    async def known(self, owner: str, idempotency: Idempotency) -> Job | None:
        """The job of a request that was here before, or None.

        Raises:
            IdempotencyConflict: another request of this owner had the same idempotency key.
        """
        async with self._db.read() as session:
            return await _known(session, owner, idempotency.key, idempotency.digest)

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
                self._settle(session, job, now, transitions.fail(job, now, CANCELLED, message, self._late_outputs_s))
            elif job.status == "in_progress":
                job.cancel_requested = True
        return job


async def _known(session: AsyncSession, owner: str, key: str, digest: str | None) -> Job | None:
    job = await session.scalar(select(Job).where(Job.owner == owner, Job.idempotency_key == key))
    if job is not None and job.request_digest != digest:
        raise IdempotencyConflict(f"Idempotency-Key {key!r} was used for another request.")
    return job
