"""The tables of jobs and API keys, the same on SQLite and PostgreSQL. Times are seconds since the epoch."""

from __future__ import annotations

import re
import secrets
import time
from typing import Any, Literal

from sqlalchemy import JSON, BigInteger, Double, Index, String, Text, and_, case
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Status = Literal["queued", "in_progress", "completed", "failed"]
# The error code of a job that its owner stopped.
CANCELLED = "cancelled"

_ID = re.compile(r"video_([0-9a-f]{14})[0-9a-f]{24}")


def new_id() -> tuple[str, float]:
    """Return a fresh video id and its time of creation.

    The id begins with that time in microseconds, so that a page of a list can start after a video that was deleted
    meanwhile; 96 random bits keep the id from being guessed.
    """
    microseconds = time.time_ns() // 1000
    return f"video_{microseconds:014x}{secrets.token_hex(12)}", microseconds / 1e6


def id_time(video_id: str) -> float | None:
    """Return the time in a video id, or None if the text is no such id."""
    match = _ID.fullmatch(video_id)
    return int(match[1], 16) / 1e6 if match else None


class Base(DeclarativeBase):
    """The base of every table. `serve_app/db/migrations` creates them; a test checks that both are the same."""

    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own declaration)
        dict[str, Any]: JSON,
        list[str]: JSON,
        float: Double,
        str: Text,
    }


class Job(Base):
    """One video that somebody asked for.

    `attempt` counts claims and fences every write of a run: a superseded run writes nothing. `failures` counts the
    attempts in a row that failed and began no further than the attempt before; `max_attempts` bounds it. A job that was
    handed back counts no failure.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), default="")
    """The id of the key that created it; empty without authentication."""
    status: Mapped[str] = mapped_column(String(16), default="queued")
    model: Mapped[str]
    params: Mapped[dict[str, Any]]
    """A `serve_app.request.Params` as JSON: what is made."""
    degrade: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """A `serve_app.degrade.Floor` as JSON, to which the request agrees; None if to nothing."""
    requested: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """The parameters that were asked for and differ from what is made; None if none does."""
    work: Mapped[float | None]
    """TFLOP of its denoising (`serve_app.wan.cost.video_tflop`); None if its creator did not know the model."""
    ranks: Mapped[int] = mapped_column(default=1)
    """Ranks of a denoiser group: one second of denoising costs as many GPU-seconds."""
    remixed_from: Mapped[str | None] = mapped_column(String(64))
    finish: Mapped[dict[str, Any] | None]
    """A `serve_app.finish.plan.Finish` as JSON; None if the video stays as it is decoded."""
    notify_email: Mapped[str | None]
    """The address of a mail that says that the job has ended."""
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    """The client's name for its request, unique among the requests of the owner."""
    request_digest: Mapped[str | None] = mapped_column(String(64))
    """SHA-256 of the request that came with the idempotency key, in hex."""
    priority: Mapped[str] = mapped_column(String(16), default="standard")
    """A `serve_app.config.Priority`."""
    created_at: Mapped[float]
    start_at: Mapped[float | None]
    """The earliest time to begin, if the request names one; waiting counts from then."""
    effective_deadline: Mapped[float] = mapped_column("turn")
    """The time by which its priority class expects it to begin (ageing): an owner's jobs are claimed in this order."""
    deadline_at: Mapped[float | None]
    """The time after which the video is of no use, by the database's clock."""
    started_at: Mapped[float | None]
    """The time at which the current attempt began."""
    denoise_at: Mapped[float | None]
    """The time at which the current attempt began to denoise."""
    completed_at: Mapped[float | None]
    """The time at which it completed or failed."""
    expires_at: Mapped[float | None]
    """The time at which row and files are removed; None for never."""

    stage: Mapped[str | None] = mapped_column(String(16))
    step: Mapped[int] = mapped_column(default=0)
    steps: Mapped[int] = mapped_column(default=0)
    progress: Mapped[int] = mapped_column(default=0)
    """Percent, 100 only when completed. It never falls within an attempt."""
    seconds_left: Mapped[float | None]

    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    interruptions: Mapped[int] = mapped_column(default=0)
    """Attempts that ended by a loss that the job did not cause."""
    resumed_step: Mapped[int] = mapped_column(default=0)
    """The furthest denoising step at which an attempt began."""
    saved_step: Mapped[int] = mapped_column(default=0)
    """The furthest denoising step whose state was saved, from which another attempt can go on."""
    lost_step: Mapped[int | None]
    """The step, counted from 1, during which a group was last lost with this job in it."""
    losses: Mapped[int] = mapped_column(default=0)
    """Groups lost in a row during that step."""
    not_before: Mapped[float] = mapped_column(default=0.0)
    announced_at: Mapped[float] = mapped_column(default=0.0)
    """The time at which dispatchers were last told that it waits; 0 if not since it began to wait."""
    lease_owner: Mapped[str | None] = mapped_column(String(64))
    lease_until: Mapped[float | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)

    error_code: Mapped[str | None] = mapped_column(String(64))
    error_message: Mapped[str | None]
    outputs: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Storage keys of its files, by the variant that users ask for; see `serve_app.events.Done`."""
    finish_result: Mapped[dict[str, Any] | None]
    """Size, length and media type of the finished video, and the seconds of each step; None if it was not finished."""
    size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    timings: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Seconds of each stage."""
    group_s: Mapped[float | None]
    """Its share of the seconds of its groups' passes, by its share of the work in each."""
    passes: Mapped[float | None]
    """The sum of its shares of passes: one that four equal videos share is a quarter for each."""
    predicted_s: Mapped[float | None]
    """Seconds from its creation to its end, as predicted then; None if nothing was known."""
    revision: Mapped[str | None] = mapped_column(String(64))
    """Revision of the weights that made it."""
    pipeline: Mapped[str | None] = mapped_column(String(128))
    """The pipeline application that it was given to at its first claim; None is `dispatcher.pipeline`."""
    tried_on: Mapped[str | None] = mapped_column(String(128))
    """The canary that failed it, after which it went to the stable pipeline."""
    tried_at: Mapped[float | None]
    """The time at which that canary failed it."""
    states: Mapped[str | None] = mapped_column(String(16))
    """Subfolder of the saved states; another one since it left a pipeline whose states do not go on elsewhere."""
    warnings: Mapped[list[str]] = mapped_column(default=list)

    __table_args__ = (
        Index("jobs_by_age", "created_at", "id"),
        Index("jobs_by_turn", "status", "owner", "turn", "id"),
        Index("jobs_by_due_time", "status", "not_before"),
        # Covers the sums of what waits, so that they read no row.
        Index("jobs_by_wait", "status", "turn", "id", "owner", "priority", "work", "not_before"),
        Index("jobs_by_start", "owner", "started_at"),
        Index("jobs_by_announcement", "status", "announced_at", "not_before"),
        Index("jobs_by_expiry", "expires_at"),
        Index("jobs_by_lease", "status", "lease_until"),
        Index("jobs_by_deadline", "status", "deadline_at"),
        Index("jobs_by_owner", "owner", "status"),
        Index("jobs_by_owner_and_age", "owner", "created_at", "id"),
        Index("jobs_by_end", "status", "completed_at"),
        Index("jobs_by_trial", "tried_on", "tried_at"),
        # When two gateways get the same request at once, this index lets only one of them create the job.
        Index("jobs_by_idempotency_key", "owner", "idempotency_key", unique=True),
    )

    @property
    def finished(self) -> bool:
        """Return whether the job has ended for good."""
        return self.status in ("completed", "failed")

    @property
    def shown_status(self) -> str:
        """The status shown to people: `cancelled` for a job that its owner stopped, which programs see as failed."""
        return "cancelled" if self.status == "failed" and self.error_code == CANCELLED else self.status

    @property
    def waits_since(self) -> float:
        """The time from which its waiting counts."""
        return max(self.created_at, self.start_at or 0)

    @property
    def prefix(self) -> str:
        """The storage folder of the current attempt."""
        return f"videos/{self.id}/{self.attempt}"

    @property
    def state_prefix(self) -> str:
        """The storage folder of all saved states of the sample."""
        return f"samples/{self.id}"

    @property
    def sample_prefix(self) -> str:
        """The storage folder of the saved states from which the next attempt goes on, within `state_prefix`."""
        return f"{self.state_prefix}/{self.states}" if self.states else self.state_prefix


# `Job.shown_status` as SQL.
SHOWN_STATUS = case((and_(Job.status == "failed", Job.error_code == CANCELLED), CANCELLED), else_=Job.status)


class Garbage(Base):
    """A storage folder to be removed once `due_at` has come.

    A row rather than a call, because a run that was cut off may store its video after the dispatcher that cut it off
    has gone.
    """

    __tablename__ = "garbage"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    prefix: Mapped[str]
    due_at: Mapped[float] = mapped_column(index=True)


class MaintenanceFlag(Base):
    """A flag that an operator has set for all dispatchers: `paused`."""

    __tablename__ = "switches"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    since: Mapped[float]


class CompatibleRevision(Base):
    """A promise of the version that made the tables of revision `head`: that of `revision` runs on them, too."""

    __tablename__ = "compatible_revisions"

    head: Mapped[str] = mapped_column(String(32), primary_key=True)
    revision: Mapped[str] = mapped_column(String(32), primary_key=True)


class Replicas(Base):
    """The number of running replicas of a deployment, which a dispatcher repeats every few seconds."""

    __tablename__ = "replicas"

    application: Mapped[str] = mapped_column(String(128), primary_key=True)
    deployment: Mapped[str] = mapped_column(String(128), primary_key=True)
    count: Mapped[int]
    at: Mapped[float]


class DegradeState(Base):
    """The level of load that all dispatchers share: one row. See `serve_app.degrade.Level`."""

    __tablename__ = "degrade"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    mode: Mapped[str] = mapped_column(String(16))
    level: Mapped[int]
    changed_at: Mapped[float]
    over_since: Mapped[float | None]
    under_since: Mapped[float | None]


class Key(Base):
    """An API key. Its id is the `owner` of the jobs that are created with it. A limit that is None does not hold."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the secret, in hex."""
    name: Mapped[str]
    """A label that its maker chose."""
    scopes: Mapped[list[str]]
    """From `serve_app.accounts.keys.SCOPES`."""
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]
    requests_per_minute: Mapped[int | None]
    queued_jobs: Mapped[int | None]
    running_jobs: Mapped[int | None]
    gpu_seconds_per_day: Mapped[float | None]
    queued_tflop: Mapped[float | None]
    degrade: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """Floor that its requests agree to if they do not say; None if to nothing."""


class Usage(Base):
    """GPU-seconds of a job that its key is charged, at most once. Outlives the job.

    A job is charged when it completes, or when its owner or its deadline cuts it off; nobody pays for losses on the
    server's side.
    """

    __tablename__ = "usage"

    job_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    at: Mapped[float]
    gpu_seconds: Mapped[float]

    __table_args__ = (Index("usage_by_owner", "owner", "at"),)
