"""The forward passes of a group: their requests to the ranks, what follows for each sample, and those that raise."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from serve_app.engine.errors import GroupLost, OutOfMemory
from serve_app.engine.flight import Flight
from serve_app.engine.group import Group
from serve_app.engine.messages import StepRequest, StepResult
from serve_app.engine.pressure import Pressure
from serve_app.engine.sample_request import Denoised
from serve_app.engine.scheduler import Entry, Scheduler
from serve_app.errors import JobFailed, one_line
from serve_app.logs import get_logger
from serve_app.metrics import catalog as metrics

logger = get_logger(__name__)

# Pixels of a side of the video for one of its latents.
_PIXELS = 8
# Steps whose seconds are kept: as many as most videos have.
_LATEST = 100


@dataclass
class Counters:
    """Counts of what an engine has done so far.

    Attributes:
        steps: forward passes.
        advanced: samples in them.
        out_of_memory: passes that did not fit into memory.
        step_s: seconds of all steps, as the ranks measured them.
        overhead_s: seconds that the rest of the engine's loop added.
        latest_s: seconds of each of the latest steps, as the ranks measured them.
    """

    steps: int = 0
    advanced: int = 0
    out_of_memory: int = 0
    step_s: float = 0.0
    overhead_s: float = 0.0
    latest_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATEST))


class Passes:
    """Makes the steps that an engine decides on.

    Args:
        group: the started ranks.
        scheduler: the engine's.
        flights: the samples inside, by id; the engine's.
        checkpoint_s: seconds of denoising after which a sample's state is saved; never if 0.

    Attributes:
        counters: what was done so far.
        pressure: whether memory is short.
        stepping: the samples in the pass under way, or in the latest one.
    """

    def __init__(self, group: Group, scheduler: Scheduler, flights: dict[str, Flight], checkpoint_s: float) -> None:
        self._group = group
        self._scheduler = scheduler
        self._flights = flights
        self._checkpoint_s = checkpoint_s
        self.counters = Counters()
        self.pressure = Pressure()
        self.stepping: list[Entry] = []

    async def step(self, entries: list[Entry], park: list[str]) -> float:
        """Make one step of these samples.

        Args:
            entries: all of one cohort.
            park: ids of samples whose state leaves the device before.

        Returns:
            Seconds that the ranks took.

        Raises:
            GroupLost: the group cannot go on.
        """
        self.stepping = entries
        metrics.parked_samples.set(len(park))
        save = {entry.id: prefix for entry in entries if (prefix := self._save_to(entry.id))}
        began = time.monotonic()
        try:
            result = await self._group.step(StepRequest([entry.id for entry in entries], park, save))
        except GroupLost:
            raise
        except Exception as error:  # whatever the model raised: it concerns samples, not the group
            seconds = await self._step_alone(entries, error)
        else:
            seconds = await self._account(entries, result, save, time.monotonic() - began)
        self.counters.step_s += seconds
        self.counters.latest_s.append(seconds)
        return seconds

    async def finish(self, flight: Flight) -> None:
        """Hand out the latents of a sample without steps left."""
        self._scheduler.remove(flight.entry.id)
        latents = await self._group.latents(flight.entry.id)
        flight.events.put_nowait(Denoised(latents, flight.seconds, flight.group_s, flight.passes))

    async def _step_alone(self, entries: list[Entry], error: Exception) -> float:
        """Step the samples of a pass that raised one by one, so that only those at fault fail.

        The pass changed nothing. Where memory was short every other sample's state leaves the device first.
        """
        logger.warning("step raised", extra={"jobs": [entry.id for entry in entries], "error": one_line(error)})
        short = isinstance(error, OutOfMemory)
        if short:
            self.counters.out_of_memory += 1
            metrics.steps_out_of_memory.inc()
            if len(entries) > 1:
                self._scheduler.lower_token_bound(entries)
        elif len(entries) == 1:
            self._fail_by(entries[0], error)
            return 0.0
        seconds = 0.0
        for entry in entries:
            if entry.id not in self._flights:  # left meanwhile
                continue
            self.stepping = [entry]
            began = time.monotonic()
            others = [sample_id for sample_id in self._flights if sample_id != entry.id] if short else []
            try:
                result = await self._group.step(StepRequest([entry.id], others))
            except GroupLost:
                raise
            except Exception as alone:
                self._fail_by(entry, alone)
            else:
                seconds += await self._account([entry], result, {}, time.monotonic() - began)
        return seconds

    async def _account(self, entries: list[Entry], result: StepResult, save: dict[str, str], passed_s: float) -> float:
        """Note what a pass did to each of its samples.

        Args:
            entries: the samples.
            result: what the ranks answered.
            save: where states are being saved, by sample.
            passed_s: seconds until the ranks had answered.

        Returns:
            Seconds that it took on the ranks.
        """
        self.counters.steps += 1
        self.counters.advanced += len(entries)
        self._scheduler.note_pass(entries, result.seconds)
        _measure(entries, result.seconds)
        self.pressure.note(result.headroom, result.largest)
        self._scheduler.tight = self.pressure.tight
        work = sum(entry.work for entry in entries)
        for entry in entries:
            if entry.id in result.failed:
                self._fail(entry, "not_finite", result.failed[entry.id])
                continue
            entry.step += 1
            flight = self._flights.get(entry.id)
            if flight is not None:  # otherwise it left during the step
                flight.advance(result.seconds, entry.id in save, passed_s, entry.work / work if work else 1.0)
                if entry.finished:
                    await self.finish(flight)
        return result.seconds

    def _save_to(self, sample_id: str) -> str | None:
        """Return where a sample's state is saved after this step; None if it is not."""
        flight = self._flights.get(sample_id)
        if flight is None or not self._checkpoint_s or flight.unsaved_s < self._checkpoint_s:
            return None
        return flight.request.state_prefix

    def _fail_by(self, entry: Entry, error: Exception) -> None:
        if isinstance(error, OutOfMemory):
            self._fail(entry, "out_of_memory", f"step {entry.step + 1} does not fit into memory, even alone: {error}")
        else:
            reason = (str(error).strip() or repr(error)).splitlines()[-1]
            self._fail(entry, "step_failed", f"step {entry.step + 1}: {reason}")

    def _fail(self, entry: Entry, code: str, message: str) -> None:
        self._scheduler.remove(entry.id)
        if (flight := self._flights.get(entry.id)) is not None:
            flight.events.put_nowait(JobFailed(code, message))


def _measure(entries: list[Entry], seconds: float) -> None:
    """Record a step that was made, before its samples count it."""
    _, height, width = entries[0].latent_shape
    metrics.step_seconds.observe(
        seconds,
        size=metrics.size_of(width * _PIXELS, height * _PIXELS),
        expert="high_noise" if entries[0].high_noise else "low_noise",
    )
    metrics.stepped_samples.inc(len(entries))
    metrics.work_tflop.inc(sum(entry.work for entry in entries) / 1e12)
