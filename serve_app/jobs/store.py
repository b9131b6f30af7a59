"""The durable queue and history of jobs. The database owns a job's state; every process here is replaceable.

Knows nothing of Ray, HTTP or storage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.accounts.keys import Keys, check_quota
from serve_app.config import Ageing, Config, RetentionConfig
from serve_app.db.database import Database
from serve_app.db.tables import CANCELLED, Job, new_id
from serve_app.degrade import Floor
from serve_app.errors import DeadlineInfeasible, ServeAppError
from serve_app.finish.plan import Finish
from serve_app.jobs import transitions
from serve_app.jobs.depth import QueueDepth
from serve_app.jobs.forecast import Fleet
from serve_app.jobs.generations import Generations
from serve_app.jobs.leases import Leases
from serve_app.jobs.maintenance import Maintenance
from serve_app.jobs.queries import Queries
from serve_app.jobs.rollouts import Rollouts
from serve_app.jobs.rows import count_end
from serve_app.jobs.shadows import Shadows
from serve_app.jobs.upkeep import Upkeep
from serve_app.metrics import catalog as metrics
from serve_app.request import Params, Urgency

WorkOf = Callable[[Params], float]
"""A function that returns the TFLOP that the denoising of a video takes."""

_NOT_URGENT = Urgency()


class QueueFull(ServeAppError):
    """The queue holds as much as it may.

    Args:
        message: one sentence for the user.
        retry_after_s: seconds until there is room; None if not known.
    """

    code = "queue_full"
    """A stable word for programs."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class WaitTooLong(QueueFull):
    """A job of this class would wait for longer than the server promises."""

    code = "wait_too_long"


class IdempotencyConflict(ServeAppError):
    """An idempotency key that its owner used before for another request."""


@dataclass(frozen=True)
class Idempotency:
    """A client's name for a request, and a digest of its content: a retry of the request returns the same job."""

    key: str
    digest: str


class Announcer(Protocol):
    """Something that tells dispatchers on all hosts that jobs wait."""

    async def announce(self, video_ids: Sequence[str]) -> bool:
        """Announce jobs, quickly and without raising; return whether dispatchers will hear of all of them."""


class JobStore(Queries, QueueDepth, Leases, Upkeep, Maintenance, Rollouts, Generations, Shadows):
    """Jobs in SQLite or PostgreSQL.

    This class creates, cancels and deletes jobs for users; `Queries` reads, `Outlook` predicts, `Degrading` offers
    less, `Leases` and `Upkeep` are for dispatchers, `Maintenance` for operators; `Rollouts`, `Generations` and
    `Shadows` are about several versions at once.

    Args:
        url: a SQLAlchemy URL; the driver may be left out.
        late_outputs_s: seconds in which a run that was cut off may still store something.
        ageing: the ageing time of each priority class, for jobs created here; the defaults if None.
        retention: how long jobs that end here are kept; the defaults if None.
        announcer: is told of jobs created here. Without one, dispatchers find them when they next look.
        ranks: ranks of a denoiser group, for GPU-seconds.
        work_of: returns the TFLOP of a video's denoising, for estimates. Without it, jobs created here have no known
            work.
        pipeline: name of the application whose replicas work on the jobs.
        fleet: those that the configuration has at least, for estimates; one group if None.

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
        pipeline: str = "wan",
        fleet: Fleet | None = None,
    ) -> None:
        super().__init__(Database(url), late_outputs_s, retention or RetentionConfig())
        self.keys = Keys(self._db)
        self._ageing = ageing or Ageing()
        self._announcer = announcer
        self._ranks = ranks
        self._work_of = work_of
        self._pipeline = pipeline
        self._fleet = self._plan = fleet or self._plan

    @classmethod
    def of(cls, config: Config, announcer: Announcer | None = None, work_of: WorkOf | None = None) -> JobStore:
        """Return the store that a configuration names, not started.

        Raises:
            ConfigError: its folder cannot be made or written to.
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
            config.dispatcher.pipeline,
            Fleet(
                config.denoiser.autoscaling.min_replicas,
                config.decoder.autoscaling.min_replicas,
                config.dispatcher.running_jobs,
                config.denoiser,
            ),
        )

    @property
    def database(self) -> Database:
        """The database of the store, for its other tables."""
        return self._db

    async def start(self) -> None:
        """Connect, and create the tables or migrate them to this version.

        Raises:
            ConfigError: the database cannot be opened, or its tables are of a newer version.
        """
        await self._db.start()

    async def close(self) -> None:
        """Close every connection."""
        await self._db.close()

    @property
    def folder(self) -> Path | None:
        """The folder of the SQLite file; None on PostgreSQL."""
        return self._db.folder

    async def ping(self) -> None:
        """Check that the database answers; raise what the driver raises if it does not."""
        async with self._db.read() as session:
            await session.execute(text("SELECT 1"))

    async def create(
        self,
        params: Params,
        model: str,
        urgency: Urgency = _NOT_URGENT,
        *,
        owner: str = "",
        idempotency: Idempotency | None = None,
        remixed_from: str | None = None,
        notify_email: str | None = None,
        finish: Finish | None = None,
        warnings: Sequence[str] = (),
        max_queued: int | None = None,
        max_wait_s: float | None = None,
        check_deadline: bool = False,
    ) -> Job:
        """Put a job into the queue and announce it. `claim` says which job is next.

        If the same request of the same owner came before (`idempotency`), its job is returned, whatever its status.

        Args:
            params: the video to make.
            model: the name of the served model.
            urgency: priority, start and deadline.
            owner: the id of the key that asks; empty without authentication.
            idempotency: the client's name for the request, if it has one.
            remixed_from: the id of the video that this one remixes.
            notify_email: the address of a mail that says that the job has ended.
            finish: the steps that finish the decoded video, if it is finished.
            warnings: sentences for the user that are known before any work.
            max_queued: most jobs that may wait; None for no limit.
            max_wait_s: most seconds that it may be expected to wait for others; None for no limit.
            check_deadline: whether to refuse a deadline that it is expected to miss.

        Raises:
            QueueFull: `max_queued` jobs wait already.
            WaitTooLong: it would wait for more than `max_wait_s`.
            DeadlineInfeasible: it would miss its deadline.
            OverLimit: the owner is at a limit of their key.
            IdempotencyConflict: another request of this owner had the same idempotency key.
        """
        if idempotency is not None and (before := await self.known(owner, idempotency)) is not None:
            return before
        job = Job(
            status="queued",
            step=0,
            saved_step=0,
            owner=owner,
            model=model,
            params=params.model_dump(),
            work=None if self._work_of is None else self._work_of(params),
            degrade=urgency.degrade.to_json() if isinstance(urgency.degrade, Floor) else None,
            ranks=self._ranks,
            idempotency_key=None if idempotency is None else idempotency.key,
            request_digest=None if idempotency is None else idempotency.digest,
            remixed_from=remixed_from,
            notify_email=notify_email,
            finish=None if finish is None else finish.model_dump(mode="json", exclude_none=True),
            warnings=[*warnings],
            priority=urgency.priority,
            start_at=urgency.start_at,
            not_before=urgency.start_at or 0.0,
        )
        job.id, job.created_at = new_id()
        job.effective_deadline = job.waits_since + getattr(self._ageing, job.priority)
        # Before the transaction, which should be short. Gateways that admit at the same moment do not see each other.
        await self._admit(job, urgency.deadline_s if check_deadline else None, max_wait_s)
        try:
            before = await self._add(job, urgency, max_queued)
        except IntegrityError:
            # Another process created the job between our look and our insert. Now we see it.
            before = None if idempotency is None else await self.known(owner, idempotency)
            if before is None:
                raise
        if before is not None:
            return before
        metrics.jobs_created.inc(priority=job.priority, size=metrics.size_of(params.width, params.height))
        self._created(job)
        if self._announcer is not None and job.announced_at:
            await self._announcer.announce([job.id])
        return job

    async def _admit(self, job: Job, deadline_s: float | None, max_wait_s: float | None) -> None:
        """Note what is expected of a job, and refuse it if that is too late. What is not known is no reason to refuse.

        Raises:
            WaitTooLong, DeadlineInfeasible: see `create`.
        """
        expected = await self.predict(job)
        if expected is None:
            return
        job.predicted_s = expected.seconds_left
        earliest_s = expected.seconds_left * self._pace.p90_factor
        if deadline_s is not None and earliest_s > deadline_s:
            message = f"'deadline_s' is {deadline_s:g}, expected at least {math.ceil(earliest_s)} at the moment."
            raise DeadlineInfeasible(message, float(math.ceil(earliest_s)))
        # The time until it may begin is not spent waiting for others.
        wait_s = expected.wait_s - max(job.not_before - job.created_at, 0.0)
        if max_wait_s is not None and wait_s > max_wait_s:
            message = f"Videos of class {job.priority!r} would wait for {wait_s:.0f} s, the limit is {max_wait_s:g}."
            raise WaitTooLong(message, wait_s - max_wait_s)

    async def _add(self, job: Job, urgency: Urgency, max_queued: int | None) -> Job | None:
        """Give a job its id and times and store it. If its request came before, store nothing and return that job."""
        async with self._db.write() as session:
            if job.idempotency_key is not None:
                before = await _known(session, job.owner, job.idempotency_key, job.request_digest)
                if before is not None:
                    return before
            # The database's clock will judge the deadline, and this host's may be off by more than that.
            now = await self._db.clock(session)
            key = await check_quota(session, job.owner, now, job.work or 0.0)
            if urgency.degrade is None and key is not None:
                job.degrade = key.degrade
            if max_queued is not None and await self._count_queued(session) >= max_queued:
                raise QueueFull(f"{max_queued} jobs wait already.", self._pace.seconds_per_job)
            job.deadline_at = None if urgency.deadline_s is None else now + urgency.deadline_s
            # A job that begins later is announced when it is due; a lost announcement is repeated.
            job.announced_at = job.created_at if job.waits_since <= job.created_at else 0.0
            session.add(job)
        return None

    async def known(self, owner: str, idempotency: Idempotency) -> Job | None:
        """Return the job of a request that came before, or None.

        Raises:
            IdempotencyConflict: another request of this owner had the same idempotency key.
        """
        async with self._db.read() as session:
            return await _known(session, owner, idempotency.key, idempotency.digest)

    def _work(self, params: dict[str, Any]) -> float | None:
        return None if self._work_of is None else self._work_of(Params(**params))

    async def delete(self, video_id: str, owner: str | None = None) -> bool:
        """Delete a job and have its files removed; False if there is none. A run of it ends when it next reports."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id)
            if job is None or owner not in (None, job.owner):
                return False
            now = await self._db.clock(session)
            session.add_all(transitions.forget(job, now, self._late_outputs_s))
            if not job.finished:
                count_end(session, "deleted", job.priority)
            await session.delete(job)
        return True

    async def request_cancel(self, video_id: str, owner: str | None = None) -> Job | None:
        """Cancel a waiting job at once, or ask the dispatcher to cancel a running one; None if there is no such job."""
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
