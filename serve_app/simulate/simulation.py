"""The simulation: jobs come, wait in order, are reduced, denoised and decoded, while groups come and go.

Scheduler, order, ageing, autoscaling decision and degrade level are those of the server, imported. Not simulated are
losses, storage, and the time of the database. The expected wait, by which jobs are refused, is that of sums: the work
that goes before over the speed of the groups; a server plays the first jobs of its queue one by one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from serve_app.config import Priority
from serve_app.degrade import Amount, Level, reduced, steer
from serve_app.engine.virtual_group import VirtualGroup
from serve_app.engine.virtual_pipeline import VirtualPipeline, VirtualSample, fewest_samples
from serve_app.jobs.backlog import Backlog, expected_wait_s, pressure
from serve_app.jobs.claim_order import ClaimOrder, Waiting
from serve_app.jobs.forecast import entry_of
from serve_app.request import Params
from serve_app.simulate.fleet import Clip, Fleet, work_of
from serve_app.simulate.scaler import Scaler
from serve_app.simulate.trace import Arrival


@dataclass
class Outcome:
    """A job and its end.

    Attributes:
        arrival: the job.
        alone_s: seconds that it would have taken alone, as asked for.
        done_at: when its video was there; None if it was refused.
        degraded: whether less was made.
    """

    arrival: Arrival
    alone_s: float
    done_at: float | None = None
    degraded: bool = False

    @property
    def wait_s(self) -> float:
        """Seconds that others took; infinity if it was refused."""
        return math.inf if self.done_at is None else max(self.done_at - self.arrival.at - self.alone_s, 0.0)


@dataclass
class Result:
    """The findings of a simulation.

    Attributes:
        outcomes: every job, in the order in which they came.
        group_s: seconds of all groups, from the moment at which they were asked for.
        busy_s: seconds of passes.
        level_changes: how often the degrade level changed.
        most_groups: largest number of groups.
        ended_at: when the last job ended.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    group_s: float = 0.0
    busy_s: float = 0.0
    level_changes: int = 0
    most_groups: int = 0
    ended_at: float = 0.0


class Simulation:
    """One run of a fleet.

    Args:
        fleet: what works, and how it is scaled.
        arrivals: the jobs, by time.
    """

    def __init__(self, fleet: Fleet, arrivals: Iterable[Arrival]) -> None:
        self._fleet = fleet
        self._draw = random.Random(fleet.seed + 1)
        self._arrivals = iter(arrivals)
        self._cost = fleet.cost
        self._reference = Clip().params
        options = fleet.denoiser.autoscaling
        self._target = options.max_replicas if options.min_replicas == options.max_replicas else options.min_replicas
        self._pipeline = VirtualPipeline(
            self._cost,
            fleet.denoiser,
            self._target,
            fleet.decoders,
            choose={"two": self._two, "emptiest": fewest_samples, "soonest": self._soonest}[fleet.router],
            ended=self._ended,
        )
        self._order = ClaimOrder()
        self._scaler = Scaler(options, fleet.denoiser.resident_samples)
        self._starting = 0
        self._cancelled = 0
        """Groups that were asked for, and are not wanted any more before they have started."""
        self._gone_busy_s = 0.0
        self._level = Level()
        self._queued: dict[Priority, float] = {}
        self._counts: dict[str, int] = {}
        self._inside: dict[str, tuple[Outcome, VirtualSample]] = {}
        self._ids = 0
        self._coming = True
        self._looked_at = 0.0
        self.result = Result(most_groups=self._target)

    def run(self) -> Result:
        """Play everything, up to the end of the last job."""
        self._pipeline.at(0.0, self._look)
        self._next_arrival(0.0)
        while self._pipeline.next_at < math.inf:
            self._pipeline.run_next()
        result = self.result
        result.busy_s = self._gone_busy_s + sum(group.busy_s for group in self._pipeline.groups)
        return result

    def _next_arrival(self, now: float) -> None:
        following = next(self._arrivals, None)
        self._coming = following is not None
        if following is not None:
            self._pipeline.at(following.at, lambda at: self._arrive(following, at))

    def _arrive(self, arrival: Arrival, now: float) -> None:
        self._next_arrival(now)
        alone_s = self._seconds(arrival.params) + self._fleet.encode_s + self._decode_s(arrival.params)
        outcome = Outcome(arrival, alone_s)
        self.result.outcomes.append(outcome)
        limit_s = getattr(self._fleet.admission.max_wait_s, arrival.priority)
        if limit_s is not None:
            wait_s = expected_wait_s(self._backlog(), len(self._pipeline.groups), arrival.priority)
            if wait_s is not None and wait_s > limit_s:
                return
        self._ids += 1
        self._queued[arrival.priority] = self._queued.get(arrival.priority, 0.0) + work_of(arrival.params)
        self._counts[arrival.priority] = self._counts.get(arrival.priority, 0) + 1
        effective = now + getattr(self._fleet.ageing, arrival.priority)
        self._order.add(Waiting(f"{self._ids:09d}", arrival.owner, effective, now, content=outcome))
        self._fill(now)

    def _fill(self, now: float) -> None:
        """Begin jobs while the dispatchers have places."""
        while len(self._pipeline) < self._fleet.running_jobs and (job := self._order.begin_next(now)) is not None:
            outcome: Outcome = job.content
            arrival = outcome.arrival
            self._queued[arrival.priority] -= work_of(arrival.params)
            params = self._made(outcome)
            work = work_of(params) * max(self._draw.gauss(1.0, self._fleet.noise), 0.1)
            entry = entry_of(job.id, params, work, arrival.priority, job.effective_deadline)
            sample = VirtualSample(entry, self._fleet.encode_s, self._decode_s(params))
            self._inside[job.id] = outcome, sample
            self._pipeline.submit(sample)

    def _made(self, outcome: Outcome) -> Params:
        arrival = outcome.arrival
        asked = Amount(arrival.params.width, arrival.params.height, arrival.params.num_inference_steps)
        floor = self._fleet.floor if arrival.may_degrade and self._fleet.degrade is not None else None
        made = reduced(asked, floor, self._level.level, arrival.priority)
        if made == asked:
            return arrival.params
        outcome.degraded = True
        less = {"width": made.width, "height": made.height, "num_inference_steps": made.steps}
        return arrival.params.model_copy(update=less)

    def _ended(self, sample: VirtualSample, now: float) -> None:
        outcome, _ = self._inside.pop(sample.entry.id)
        outcome.done_at = now
        self._counts[outcome.arrival.priority] -= 1
        self.result.ended_at = now
        self._order.ended(outcome.arrival.owner)
        self._fill(now)

    def _look(self, now: float) -> None:
        """Scale, and steer the degrade level."""
        result, groups = self.result, len(self._pipeline.groups)
        result.group_s += (groups + self._starting) * (now - self._looked_at)
        self._looked_at = now
        backlog = self._backlog()
        options = self._fleet.denoiser.autoscaling
        if options.min_replicas != options.max_replicas:
            self._scale(self._scaler.target(backlog, len(self._inside), self._target, now), now)
        if self._fleet.degrade is not None:
            targets = options.target_wait_s.model_dump()
            wait = pressure(backlog, groups, targets)
            late = wait is not None and wait > 1 + self._fleet.degrade.start_s / min(targets.values())
            before = self._level.level
            self._level = steer(self._level, wait, groups >= options.max_replicas or late, now)
            result.level_changes += before != self._level.level
        if self._coming or self._inside or len(self._order):
            self._pipeline.at(now + self._fleet.look_s, self._look)

    def _scale(self, target: int, now: float) -> None:
        self._target = target
        missing = target - len(self._pipeline.groups) - (self._starting - self._cancelled)
        for _ in range(missing):
            if self._cancelled:
                self._cancelled -= 1
                continue
            self._starting += 1
            self._pipeline.at(now + self._fleet.start_s, self._started)
        for _ in range(-missing):
            if self._starting > self._cancelled:  # Serve stops those first that have not started
                self._cancelled += 1
            else:
                newest = self._pipeline.groups[-1]
                self._pipeline.remove_group(newest)
                self._gone_busy_s += newest.busy_s

    def _started(self, now: float) -> None:
        self._starting -= 1
        if self._cancelled:
            self._cancelled -= 1
            return
        self._pipeline.add_group()
        self._fill(now)
        self.result.most_groups = max(self.result.most_groups, len(self._pipeline.groups))

    def _backlog(self) -> Backlog:
        work: dict[str, float] = {str(name): amount for name, amount in self._queued.items()}
        denoising = 0
        for outcome, sample in self._inside.values():
            priority = outcome.arrival.priority
            work[priority] = work.get(priority, 0.0) + sample.entry.remaining
            denoising += sample.denoise_at < math.inf
        held = min(denoising, len(self._pipeline.groups) * self._fleet.denoiser.resident_samples)
        rate = work_of(self._reference) / self._seconds(self._reference)
        return Backlog(work, self._counts, held, rate)

    def _seconds(self, params: Params) -> float:
        """Return the seconds of a video's passes."""
        return self._cost.fixed_s * params.num_inference_steps + self._cost.per_work_s * work_of(params)

    def _decode_s(self, params: Params) -> float:
        pixels = params.width * params.height * params.num_frames
        most = self._reference.width * self._reference.height * self._reference.num_frames
        return self._fleet.decode_s * pixels / most

    def _two(self, groups: Sequence[VirtualGroup], now: float) -> VirtualGroup:
        return min((self._draw.choice(groups), self._draw.choice(groups)), key=len)

    def _soonest(self, groups: Sequence[VirtualGroup], now: float) -> VirtualGroup:
        return min(groups, key=lambda group: group.seconds_of_work)
