"""A denoiser group on a virtual clock: the engine's own scheduler, with passes whose seconds are computed.

Forecasts of the queue and the simulator run on it. Pure, without Ray or torch. Times are seconds on the clock of the
samples' effective deadlines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve_app.config import DenoiserConfig
from serve_app.engine.admission_queue import Candidate
from serve_app.engine.scheduler import Entry, Scheduler

# A pass that ends this little after a moment ends at it: sums of floating-point seconds are not exact.
_SAME_MOMENT = 1e-9


@dataclass(frozen=True)
class PassCost:
    """The seconds of a forward pass: a fixed part, and one that grows with the work in it.

    Attributes:
        fixed_s: seconds of each pass, whatever is in it.
        per_work_s: seconds for a unit of work, such as one TFLOP.
    """

    fixed_s: float
    per_work_s: float

    def seconds(self, entries: list[Entry]) -> float:
        """Return the seconds of one pass of these samples."""
        return self.fixed_s + self.per_work_s * sum(entry.work for entry in entries)


@dataclass
class _Stretch:
    """Equal passes in a row, until one of their samples has no step left or something else is picked."""

    begun_at: float
    pass_s: float
    passes: int
    chosen: list[Entry]

    @property
    def ends_at(self) -> float:
        return self.begun_at + self.passes * self.pass_s

    def cut(self, now: float) -> None:
        """End with the pass that is under way at `now`."""
        done = math.ceil((now - self.begun_at) / self.pass_s - _SAME_MOMENT)
        self.passes = min(max(done, 1), self.passes)


class VirtualGroup:
    """The samples of one group and its passes.

    Args:
        cost: seconds of a pass.
        options: the denoiser's options, of which the bounds of a pass and of the group hold.

    Attributes:
        busy_s: seconds of all passes so far.
    """

    def __init__(self, cost: PassCost, options: DenoiserConfig) -> None:
        self._cost = cost
        self._places = options.resident_samples
        self._scheduler = Scheduler(
            options.samples_per_step,
            options.tokens_per_step,
            options.step_memory_mib,
            costly_switch=options.experts == "swap",
        )
        self._inside: dict[str, Entry] = {}
        self._waiting: dict[str, tuple[Candidate, Entry]] = {}
        self._stretch: _Stretch | None = None
        self._begins_at = math.inf
        """When an idle group makes its next pass. Samples that come at the same moment all take part in the choice."""
        self.busy_s = 0.0

    def __len__(self) -> int:
        """Return how many samples are inside or wait for a place."""
        return len(self._inside) + len(self._waiting)

    @property
    def next_at(self) -> float:
        """The time at which something changes by itself; infinity if nothing is left to do."""
        return self._stretch.ends_at if self._stretch is not None else self._begins_at

    @property
    def entries(self) -> list[Entry]:
        """The samples inside, then those that wait for a place."""
        return [*self._inside.values(), *(entry for _, entry in self._waiting.values())]

    @property
    def seconds_of_work(self) -> float:
        """Seconds of all steps that are left, if no two samples shared a pass."""
        return sum(
            (entry.steps - entry.step) * (self._cost.fixed_s + self._cost.per_work_s * entry.work)
            for entry in self.entries
        )

    def add(self, entry: Entry, now: float) -> None:
        """Take a sample. As in the engine, a sample of a less urgent class makes room for it if no place is free."""
        if len(self._inside) >= self._places:
            last = self._scheduler.order(now)[-1]
            if last.priority <= entry.priority or last.effective_deadline <= now:
                self._wait(entry)
                return
            self._cut(now)
            self._leave(last)
            self._wait(last)
        self._enter(entry)
        self._cut(now)
        if self._stretch is None:
            self._begins_at = min(self._begins_at, now)

    def leave(self, now: float) -> list[Entry]:
        """Stop, and return all samples, with the steps that were complete by now."""
        if (stretch := self._stretch) is not None:
            done = min(int((now - stretch.begun_at) / stretch.pass_s + _SAME_MOMENT), stretch.passes)
            self.busy_s += done * stretch.pass_s
            for entry in stretch.chosen:
                entry.step += done
        left = self.entries
        for entry in list(self._inside.values()):
            self._leave(entry)
        self._waiting.clear()
        self._stretch, self._begins_at = None, math.inf
        return left

    def advance(self) -> list[Entry]:
        """Go on to `next_at`, and return the samples that have no step left then."""
        stretch, self._stretch = self._stretch, None
        if stretch is None:
            self._begin(self._begins_at)
            return []
        now = stretch.ends_at
        self.busy_s += stretch.passes * stretch.pass_s
        self._scheduler.note_pass(stretch.chosen, stretch.pass_s)
        finished = []
        for entry in stretch.chosen:
            entry.step += stretch.passes
            if entry.finished and entry.id in self._inside:
                self._leave(entry)
                finished.append(entry)
        self._fill(now)
        self._begin(now)
        return finished

    def _begin(self, now: float) -> None:
        self._begins_at = math.inf
        held = {entry.id: entry.held for entry in self._inside.values()}
        chosen = self._scheduler.pick(now)
        if not chosen:
            return
        passes = min((e.boundary if e.step < e.boundary < e.steps else e.steps) - e.step for e in chosen)
        if any(entry.held != held[entry.id] for entry in self._inside.values()):
            passes = 1  # how often somebody was held is counted by passes
        self._stretch = _Stretch(now, self._cost.seconds(chosen), passes, chosen)
        # At an effective deadline the order changes.
        ageing = [e.effective_deadline for e in self._inside.values() if now < e.effective_deadline]
        if ageing and (first := min(ageing)) < self._stretch.ends_at:
            self._stretch.cut(first)

    def _cut(self, now: float) -> None:
        if self._stretch is not None:
            self._stretch.cut(now)

    def _enter(self, entry: Entry) -> None:
        self._inside[entry.id] = entry
        self._scheduler.add(entry)

    def _leave(self, entry: Entry) -> None:
        del self._inside[entry.id]
        self._scheduler.remove(entry.id)

    def _fill(self, now: float) -> None:
        """Give free places to those that wait, in the order of the admission queue."""
        while self._waiting and len(self._inside) < self._places:
            first = min(self._waiting.values(), key=lambda one: one[0].key(now))[1]
            del self._waiting[first.id]
            self._enter(first)

    def _wait(self, entry: Entry) -> None:
        self._waiting[entry.id] = Candidate(entry.id, entry.priority, entry.effective_deadline), entry
