"""Durable jobs: who drives them, where they are kept, and for how long."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from serve_app.config.section import NonNegativeFloat, Section


class DispatcherConfig(Section):
    """The process that leases jobs and drives them through a pipeline."""

    pipeline: str = "wan"
    """Name of the Serve application that holds the pipeline."""
    num_cpus: NonNegativeFloat = 0.1
    running_jobs: PositiveInt = 64
    """Jobs that one dispatcher drives at once; the rest waits in the store. More than groups hold, so that an urgent
    one finds its way to them."""
    max_attempts: PositiveInt = 5
    """A job fails after this many attempts in a row that ended badly and began no further than the one before."""
    max_interruptions: PositiveInt = 100
    """A job fails after this many attempts that were ended by losses around it, which it had no part in."""
    group_losses: PositiveInt = 2
    """A job whose group was lost this many times during one and the same step fails as poisonous."""
    lease_s: PositiveFloat = 15
    """A job whose dispatcher was silent for this long is taken up by another."""
    poll_s: PositiveFloat = 1
    """How often the store is asked for work when nobody announced any."""
    retry_s: NonNegativeFloat = 5
    """Wait before the third attempt of a job that failed, the second being made at once; doubles with each further one.
    Also before the next attempt of one that was interrupted sooner than this after it began."""
    late_outputs_s: NonNegativeFloat = 600
    """How long after a run was cut off files that it still stored are looked for and removed."""


class Ageing(Section):
    """For each priority class the seconds of waiting after which a job is no longer overtaken by any that came later.

    Before, a more urgent class goes first, and within a class on a group of ranks whichever has the least work left.
    """

    interactive: NonNegativeFloat = 60
    standard: NonNegativeFloat = 900
    batch: NonNegativeFloat = 6 * 3600

    @model_validator(mode="after")
    def _order(self) -> Ageing:
        if not self.interactive <= self.standard <= self.batch:
            given = f"{self.interactive:g}, {self.standard:g}, {self.batch:g}"
            raise ValueError(f"has {given}, expected interactive <= standard <= batch")
        return self


class StoreConfig(Section):
    """The database of jobs."""

    url: str = ""
    """A SQLAlchemy URL; empty is SQLite at `<home>/jobs.db`."""
    shared_disk: bool = False
    """All hosts see the same local disk, so SQLite may serve a cluster of several: for trying things out on one
    machine. A network file system is none: SQLite's locks do not hold there."""


class QueueConfig(Section):
    """How dispatchers hear of jobs. The jobs themselves are in the store, whatever is chosen here."""

    transport: Literal["database", "rabbitmq"] = "database"
    """`database`: dispatchers ask the store every `dispatcher.poll_s`. `rabbitmq`: they are told, and ask the store
    every `poll_s` of this section only, or every `dispatcher.poll_s` while the broker is away."""
    url: str = ""
    """Of the broker, `amqp://user:password@host:5672/vhost` or `amqps://…`; empty is `$WAN_SERVE_QUEUE_URL`."""
    name: str = Field("wan-jobs", pattern=r"^[A-Za-z0-9._-]{1,200}$")
    """Of the queue; what cannot be read goes to `<name>.dead`."""
    poll_s: PositiveFloat = 15
    """With `rabbitmq`: how often the store is asked all the same, and after how long a job that still waits is
    announced again where the broker's queue is empty."""
    publish_timeout_s: PositiveFloat = 2
    """How long an announcement may take before the broker counts as away."""


class RetentionConfig(Section):
    """Seconds after which a job that has ended is forgotten, with its files. 0 keeps it until somebody deletes it."""

    completed_s: NonNegativeFloat = 7 * 86400
    failed_s: NonNegativeFloat = 7 * 86400
