"""Durable jobs: their dispatcher, store, queue, order and retention."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from serve_app.config.section import NonNegativeFloat, Section


class CanaryConfig(Section):
    """The trial of a second pipeline, which is aborted by itself when its jobs fail or take too long."""

    failure_ratio: float = Field(0.1, ge=0.02, le=0.9)
    """Share of failed jobs that counts as bad, or five times the stable pipeline's share if that is more."""
    max_slowdown: float = Field(1.3, gt=1)
    """A canary is aborted when the median of its seconds per TFLOP is more than this many times the stable one's."""
    speed_jobs: PositiveInt = 8
    """Jobs of a canary that its speed is judged by at least."""
    start_within_s: PositiveFloat = 600
    """A canary that was given a job and begins none within this many seconds is aborted."""
    bake_s: NonNegativeFloat = 3600
    """Seconds that a trial takes at least before a canary counts as good."""
    auto_promote: bool = False
    """Make a canary that counts as good the stable pipeline. Without it an operator does that."""
    shadow: bool = False
    """Have the canary also make copies of completed jobs while nothing else waits. They are compared with the original
    and removed; nobody is told of them or charged."""


class DispatcherConfig(Section):
    """The process that leases jobs and drives them through a pipeline."""

    pipeline: str = "wan"
    """Name of the Serve application that holds the pipeline."""
    pipelines: dict[str, NonNegativeFloat] = {}  # noqa: RUF012 (pydantic copies it)
    """Shares of the jobs of `pipeline` and of a canary, e.g. `{wan: 95, wan-next: 5}`. They count where the store does
    not know the name yet; afterwards `wan-serve canary` changes them."""
    canary: CanaryConfig = CanaryConfig()
    generation: str = Field("", max_length=128)
    """Name of the dispatchers that are deployed together; empty is `$WAN_SERVE_GENERATION`. Of several generations on
    one store only the current one leases jobs. Without a name a dispatcher always does."""
    drain_s: NonNegativeFloat = 600
    """Seconds for which a generation that is no longer current lets its jobs run, before it hands them to the next."""
    num_cpus: NonNegativeFloat = 0.1
    """CPUs that Ray reserves for the dispatcher."""
    running_jobs: PositiveInt = 64
    """Jobs that one dispatcher drives at once; the others wait in the store. It should be more than the groups hold, so
    that an urgent job reaches them."""
    max_attempts: PositiveInt = 5
    """A job fails after this many failed attempts in a row of which none began at a later step than the one before."""
    max_interruptions: PositiveInt = 100
    """A job fails after this many attempts that were interrupted by losses elsewhere, e.g. of a host."""
    group_losses: PositiveInt = 2
    """A job whose group was lost this many times during the same step fails, as the likely cause."""
    lease_s: PositiveFloat = 15
    """Seconds without a sign of its dispatcher after which another dispatcher takes over a job."""
    poll_s: PositiveFloat = 1
    """Seconds between two looks at the store for jobs that were not announced."""
    retry_s: NonNegativeFloat = 5
    """Seconds before the third attempt of a job; they double with each further one, and the second is made at once. An
    attempt that was interrupted sooner than this after its start is followed by the same wait."""
    late_outputs_s: NonNegativeFloat = 600
    """Seconds after the end of a lost attempt during which files that it still stores are found and removed."""

    @model_validator(mode="after")
    def _two_pipelines(self) -> DispatcherConfig:
        if self.pipelines:
            names = ", ".join(self.pipelines)
            if self.pipeline not in self.pipelines or len(self.pipelines) > 2:
                raise ValueError(f"pipelines has {names}, expected {self.pipeline!r} (`pipeline`) and at most one more")
            if self.pipelines[self.pipeline] <= 0:
                raise ValueError(f"pipelines has no share for {self.pipeline!r}, expected one above 0")
        return self


class Ageing(Section):
    """Seconds of waiting, for each priority class, after which no job that came later overtakes a job.

    Before that, a more urgent class goes first, and within a class the job with the least work left.
    """

    interactive: NonNegativeFloat = 60
    """Seconds for `interactive` jobs."""
    standard: NonNegativeFloat = 900
    """Seconds for `standard` jobs."""
    batch: NonNegativeFloat = 6 * 3600
    """Seconds for `batch` jobs."""

    @model_validator(mode="after")
    def _order(self) -> Ageing:
        if not self.interactive <= self.standard <= self.batch:
            given = f"{self.interactive:g}, {self.standard:g}, {self.batch:g}"
            raise ValueError(f"has {given}, expected interactive <= standard <= batch")
        return self


class MaxWait(Section):
    """Seconds that a job may be expected to wait for others, for each priority class. Null is no limit."""

    interactive: PositiveFloat | None = None
    """Seconds for `interactive` jobs."""
    standard: PositiveFloat | None = None
    """Seconds for `standard` jobs."""
    batch: PositiveFloat | None = None
    """Seconds for `batch` jobs."""


class AdmissionConfig(Section):
    """The jobs that are accepted, by what is expected of them. While nothing is known, all are."""

    max_wait_s: MaxWait = MaxWait()
    check_deadlines: bool = True
    """Answer 422 `deadline_infeasible` to a request whose deadline would be missed, with the earliest likely one."""


class DegradeConfig(Section):
    """Less for requests that allow it, while waits exceed `denoiser.autoscaling.target_wait_s`."""

    start_s: PositiveFloat = 300
    """Seconds in which another group can be there. As long as the expected wait exceeds its target by less than this,
    and there are fewer groups than `max_replicas`, starting one comes first."""


class StoreConfig(Section):
    """The database of jobs."""

    url: str = ""
    """A SQLAlchemy URL; empty is SQLite at `<home>/jobs.db`."""
    shared_disk: bool = False
    """Says that all hosts see the same local disk, so that several may share SQLite: for trials on one machine. A
    network file system does not count: SQLite's locks do not hold there."""


class QueueConfig(Section):
    """The way in which dispatchers hear of jobs. The jobs themselves are always in the store."""

    transport: Literal["database", "rabbitmq"] = "database"
    """`database`: dispatchers look at the store every `dispatcher.poll_s`. `rabbitmq`: jobs are announced, and
    dispatchers look at the store every `queue.poll_s`, or every `dispatcher.poll_s` while the broker is away."""
    url: str = ""
    """URL of the broker, `amqp://user:password@host:5672/vhost` or `amqps://…`; empty is `$WAN_SERVE_QUEUE_URL`."""
    name: str = Field("wan-jobs", pattern=r"^[A-Za-z0-9._-]{1,200}$")
    """Name of the queue. Messages that cannot be read go to `<name>.dead`."""
    poll_s: PositiveFloat = 15
    """With `rabbitmq`: seconds between two looks at the store, and seconds after which a job that still waits is
    announced again if the broker's queue is empty."""
    publish_timeout_s: PositiveFloat = 2
    """Seconds that an announcement may take before the broker counts as away."""


class RetentionConfig(Section):
    """Seconds after which an ended job and its files are deleted. 0 keeps them until somebody deletes them."""

    completed_s: NonNegativeFloat = 7 * 86400
    """Seconds after a video was completed."""
    failed_s: NonNegativeFloat = 7 * 86400
    """Seconds after a video failed."""
