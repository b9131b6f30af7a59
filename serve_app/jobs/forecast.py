"""A forecast of the queue: when each job will be done, by running all of them through the stages on a virtual clock.

It uses the engine's own scheduler and the order of the queue, so it knows classes, shared passes, idle groups, ageing,
the turns of owners, and the steps that a job has behind it. It cannot know what comes later. Pure, without a database.
Times are seconds since the epoch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

from serve_app.config import DenoiserConfig, Priority
from serve_app.engine.scheduler import Entry
from serve_app.engine.virtual_pipeline import VirtualPipeline, VirtualSample
from serve_app.jobs.claim_order import ClaimOrder, Waiting
from serve_app.jobs.estimate import Pace
from serve_app.parameters import SIDE_MULTIPLE
from serve_app.request import Params

# Noise level at which the experts change, if a request leaves that to the checkpoint: A14B's own.
_BOUNDARY = 0.875
# Share of a decode under way that is left, on average.
_HALF = 0.5
_RANK: dict[str, int] = {name: rank for rank, name in enumerate(get_args(Priority))}


@dataclass(frozen=True)
class Fleet:
    """The replicas that work on jobs.

    Attributes:
        groups: number of denoiser groups; None if not known.
        decoders: number of decoders.
        places: most jobs that the dispatchers drive at once.
        denoiser: options of a group.
    """

    groups: int | None
    decoders: int = 1
    places: int = 64
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)


@dataclass(frozen=True)
class Upcoming:
    """A job that waits or runs, as a forecast sees it. The fields are those of `Job`."""

    id: str
    params: dict[str, Any]
    work: float | None
    priority: str = "standard"
    owner: str = ""
    status: str = "queued"
    effective_deadline: float = 0.0
    not_before: float = 0.0
    stage: str | None = None
    step: int = 0
    saved_step: int = 0
    started_at: float | None = None
    finish: dict[str, Any] | None = None


@dataclass(frozen=True)
class Expected:
    """The end that a forecast expects of a job.

    Attributes:
        done_at: when its video will be there.
        alone_s: seconds that it would take on an idle server.
        seconds_left: seconds until its video is there.
    """

    done_at: float
    alone_s: float
    seconds_left: float

    @property
    def wait_s(self) -> float:
        """Seconds of these that go to other jobs."""
        return max(self.seconds_left - self.alone_s, 0.0)


def forecast(jobs: Iterable[Upcoming], pace: Pace, fleet: Fleet, now: float) -> dict[str, Expected]:
    """Return what is expected of each job, by its id; empty if the speed or the number of groups is not known.

    Args:
        jobs: all that wait or run.
        pace: what the last jobs took.
        fleet: what works on them.
        now: the database's time.
    """
    cost = pace.pass_cost
    if cost is None or not fleet.groups:
        return {}
    jobs = list(jobs)
    running = [job for job in jobs if job.status == "in_progress"]
    by_owner = Counter(job.owner for job in running)
    served_at = {job.owner: job.started_at or 0.0 for job in sorted(running, key=lambda job: job.started_at or 0.0)}
    order = ClaimOrder(running=by_owner, served_at=served_at)
    found: dict[str, Expected] = {}
    samples = {job.id: _sample(job, pace, now) for job in jobs}
    owners = {job.id: job.owner for job in jobs}
    alone = {
        sample_id: sample.encode_s
        + (one.steps - one.step) * (cost.fixed_s + cost.per_work_s * one.work)
        + sample.decode_s
        + sample.after_s
        for sample_id, sample in samples.items()
        for one in (sample.entry,)
    }

    def ended(sample: VirtualSample, at: float) -> None:
        one = sample.entry.id
        found[one] = Expected(at, alone[one], at - now)
        order.ended(owners[one])
        fill(at)

    pipeline = VirtualPipeline(cost, fleet.denoiser, fleet.groups, fleet.decoders, now, ended=ended)

    def fill(at: float) -> None:
        while len(pipeline) < fleet.places and (job := order.begin_next(at)) is not None:
            pipeline.submit(samples[job.id])

    for job in running:
        pipeline.submit(samples[job.id])
    for job in jobs:
        if job.status != "in_progress":
            order.add(Waiting(job.id, job.owner, job.effective_deadline, job.not_before))
            if job.not_before > now:
                pipeline.at(job.not_before, fill)
    fill(now)
    while pipeline.next_at < math.inf:
        pipeline.run_next()
    return found


def entry_of(
    sample_id: str, params: Params, work: float, priority: str, effective_deadline: float, step: int = 0
) -> Entry:
    """Return a job as the scheduler of a group would know it.

    Args:
        sample_id: its id.
        params: what is made.
        work: TFLOP of all its steps.
        priority: its class.
        effective_deadline: as in `Entry`.
        step: steps that are done.
    """
    frames, height, width = params.latent_shape
    steps = params.num_inference_steps
    patch = SIDE_MULTIPLE // 8  # latents have an eighth of the pixels of a side
    return Entry(
        sample_id,
        (frames, height, width),
        params.guided,
        tokens=frames * (height // patch) * (width // patch),
        steps=steps,
        boundary=boundary_step(params),
        step=min(step, steps),
        priority=_RANK[priority],
        effective_deadline=effective_deadline,
        work=work / steps,
    )


def boundary_step(params: Params) -> int:
    """Return about how many steps the high-noise expert makes: noise levels fall evenly, then `flow_shift` bends them.

    A noise level s becomes shift·s / (1 + (shift - 1)·s); the first expert makes the steps above the boundary.
    """
    ratio = _BOUNDARY if params.boundary_ratio is None else params.boundary_ratio
    level = ratio / (params.flow_shift - (params.flow_shift - 1) * ratio)
    return min(max(math.ceil((1 - level) * params.num_inference_steps), 0), params.num_inference_steps)


def _sample(job: Upcoming, pace: Pace, now: float) -> VirtualSample:
    params = Params(**job.params)
    at_work = job.status == "in_progress"
    step = job.step if at_work and job.stage == "denoise" else job.saved_step
    encode_s, decode_s = pace.encode_s, pace.decode_s(params.width * params.height * params.num_frames)
    finish_s = pace.finish_s if job.finish else 0.0
    if at_work and job.stage in ("denoise", "decode", "finish"):
        encode_s = 0.0
    elif at_work:
        encode_s = max(encode_s - (now - (job.started_at or now)), 0.0)
    if at_work and job.stage == "decode":
        step, decode_s = params.num_inference_steps, decode_s * _HALF
    elif at_work and job.stage == "finish":
        step, decode_s, finish_s = params.num_inference_steps, 0.0, finish_s * _HALF
    work = pace.typical_work if job.work is None else job.work
    entry = entry_of(job.id, params, work, job.priority, job.effective_deadline, step)
    return VirtualSample(entry, encode_s, decode_s, pace.other_s + finish_s)
