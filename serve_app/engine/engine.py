"""The step engine: holds the samples of one group and asks the group for one denoising step after the other.

Between two steps everything may change: samples join, overtake, finish, move to another group and leave. Runs in the
coordinator's event loop and does no math itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from serve_app.config import Config, Priority
from serve_app.engine.admission_queue import AdmissionQueue, Claim, Leaving
from serve_app.engine.group import Group, GroupLost
from serve_app.engine.messages import OutOfMemory, StepRequest, StepResult
from serve_app.engine.sample_request import Denoised, EncodedRequest, Moved, SampleRequest
from serve_app.engine.scheduler import Entry, Scheduler
from serve_app.errors import JobFailed, one_line
from serve_app.events import Progress
from serve_app.logs import get_logger

if TYPE_CHECKING:
    from serve_app.wan.weights.checkpoint import Expert

logger = get_logger(__name__)

# Weight of the newest step in the running mean of step times: follows batch mates that come and go.
_NEWEST = 0.3
_LATEST = 100
"""Steps of which the seconds are kept, as many as most videos have."""


@dataclass
class _Flight:
    """A sample in the engine: what its listener has yet to hear, and how long its steps take."""

    ticket: SampleRequest
    entry: Entry
    events: asyncio.Queue[Progress | Denoised | Moved | Exception] = field(default_factory=asyncio.Queue)
    admitted: float = field(default_factory=time.monotonic)
    last_step: float = field(default_factory=time.monotonic)
    step_s: float | None = None
    came_at: int = 0
    """The step that it came with."""
    unsaved_s: float = 0.0
    """Seconds of denoising that would be lost with the group."""


class Engine:
    """Drives a group.

    Args:
        group: the started ranks.
        config: the deployment's configuration.
        experts: which ones the ranks hold; None is all.
    """

    def __init__(self, group: Group, config: Config, experts: tuple[Expert, ...] | None = None) -> None:
        self._stage = stage = config.denoiser
        self._ageing = config.ageing
        self._group = group
        self._experts = experts
        self._scheduler = Scheduler(
            stage.samples_per_step,
            stage.tokens_per_step,
            stage.step_memory_mib,
            stage.parked_memory_mib,
            costly_switch=stage.experts == "swap",
        )
        self._flights: dict[str, _Flight] = {}
        self._coming: set[asyncio.Future[None]] = set()
        """Done when a sample that the ranks were asked to take has been taken, or not."""
        self._seats = AdmissionQueue(stage.resident_samples)
        self._stepping: list[Entry] = []
        self._yielding: str | None = None
        """Who was moved for somebody waiting, and has not left yet."""
        self._work = asyncio.Event()
        self.lost = asyncio.Event()
        """Set when the group cannot go on; the owner must replace it."""
        self.reason: str | None = None
        self.leaving = False
        """Whether samples are moved away rather than stepped; see `drain`."""
        self.steps = 0
        """Forward passes so far; `advanced` counts the samples in them, `out_of_memory` those that did not fit."""
        self.advanced = self.out_of_memory = 0
        self.step_s = self.overhead_s = 0.0
        """Seconds of all steps as the ranks measured them, and what the rest of the loop added."""
        self.latest_s: deque[float] = deque(maxlen=_LATEST)
        """Of each of the latest steps, as the ranks measured it."""
        self._task = asyncio.create_task(self._run(), name="engine")

    @asynccontextmanager
    async def seat(self, ticket: SampleRequest) -> AsyncIterator[None]:
        """Room for one sample; waits while `denoiser.resident_samples` are in. Leaving it, for whatever reason and at
        whatever moment, frees the sample.

        Taken before the admission, not in it: admissions are batched, and one that waited for room would keep its
        batch mates from being heard, who then would never make room.

        Raises:
            JobFailed: the sample has a seat already.
            Leaving: `drain` was called, or the group is lost.
        """
        claim = Claim(ticket.id, get_args(Priority).index(ticket.priority), self._effective_deadline(ticket))
        self._work.set()  # somebody less urgent may have to make room
        await self._seats.take(claim)
        try:
            yield
        finally:
            self._seats.leave(ticket.id)
            await self._leave(ticket.id)

    async def admit(self, admission: EncodedRequest) -> None:
        """Take in a sample that has a seat.

        Raises:
            Leaving: the group is lost.
            JobFailed: it was lost meanwhile, or the seat was left.
        """
        if self.reason is not None:
            raise Leaving(self.reason)
        coming = asyncio.get_running_loop().create_future()
        self._coming.add(coming)
        try:
            await self._take(admission)
        except GroupLost as error:
            self.lose(error)
            raise JobFailed("group_lost", str(error), retryable=True) from error
        finally:
            self._coming.discard(coming)
            coming.set_result(None)

    async def _take(self, admission: EncodedRequest) -> None:
        ticket = admission.ticket
        admitted = await self._group.admit(
            ticket.id, ticket.params, admission.positive, admission.negative, admission.state
        )
        if self.reason is not None:  # who is inside has heard it; who comes after that must hear it too
            raise GroupLost(self.reason)
        if ticket.id not in self._seats:
            await self._group.drop([ticket.id])
            raise JobFailed("cancelled", f"sample {ticket.id} was left before it began")
        if admitted.refused is not None:
            logger.warning("saved state not used", extra={"job": ticket.id, "reason": admitted.refused})
        entry = Entry(
            id=ticket.id,
            latent_shape=ticket.params.latent_shape,
            guided=ticket.params.guided,
            tokens=admitted.tokens,
            steps=admitted.steps,
            boundary=admitted.boundary,
            step=admitted.step,
            priority=get_args(Priority).index(ticket.priority),
            effective_deadline=self._effective_deadline(ticket),
            work=admitted.work,
            step_mib=admitted.step_mib,
            state_mib=admitted.state_mib,
            alone=ticket.alone,
        )
        self._flights[ticket.id] = _Flight(ticket, entry, came_at=entry.step)
        self._scheduler.add(entry)
        self._work.set()

    def step_of(self, sample_id: str) -> int:
        """How many steps an admitted sample has behind it."""
        return self._flights[sample_id].entry.step

    async def events(self, sample_id: str) -> AsyncIterator[Progress | Denoised | Moved]:
        """What happens to an admitted sample, up to its end here.

        Raises:
            JobFailed: the sample failed.
        """
        flight = self._flights[sample_id]
        while True:
            event = await flight.events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if not isinstance(event, Progress):
                return

    @property
    def resident(self) -> int:
        """Samples inside."""
        return len(self._flights)

    def drain(self) -> None:
        """Move every sample away after the step in flight, and take no more, until `stay` is called."""
        self.leaving = True
        self._seats.close()
        self._work.set()

    def stay(self) -> None:
        """Take samples again."""
        self.leaving = False
        self._seats.open()

    async def _leave(self, sample_id: str) -> None:
        """Forget a sample, wherever it is; a step in flight ends first, then its memory is free."""
        if self._flights.pop(sample_id, None) is None:
            return
        if self._yielding == sample_id:
            self._yielding = None
        self._scheduler.remove(sample_id)
        if self.reason is None:
            try:
                await self._group.drop([sample_id])
            except GroupLost as error:
                self.lose(error)

    async def _run(self) -> None:
        while self.reason is None:
            self._stepping = []
            began = time.monotonic()
            try:
                if self._coming:
                    # Ranks take who comes as soon as their step ends. Ordering the next one before they have answered
                    # would leave those samples out of it, and a step of others can be long.
                    await asyncio.wait(self._coming)
                await self._move_away()
                now = time.time()
                self._stepping = stepping = self._scheduler.pick(now)
                if stepping:
                    seconds = await self._step(stepping, self._scheduler.parked_off_device(stepping, now))
                    self.step_s += seconds
                    self.latest_s.append(seconds)
                    self.overhead_s += time.monotonic() - began - seconds
                else:
                    self._work.clear()
                    await self._work.wait()
            except GroupLost as error:
                self.lose(error)
            except Exception as error:  # a defect of ours: a loop that ended unheard would leave everybody waiting
                logger.exception("engine failed")
                self.lose(GroupLost(f"the engine failed: {one_line(error)}", host=True))

    async def _step(self, entries: list[Entry], park: list[str]) -> float:
        """One step of these samples; the seconds that the ranks took."""
        save = {entry.id: prefix for entry in entries if (prefix := self._save_to(entry.id))}
        try:
            stepped = await self._group.step(StepRequest([entry.id for entry in entries], park, save))
        except GroupLost:
            raise
        except Exception as error:  # whatever the model raised: it concerns samples, not the group
            return await self._step_alone(entries, error)
        return await self._stepped(entries, stepped, save)

    async def _step_alone(self, entries: list[Entry], error: Exception) -> float:
        """After a pass that raised, which changed nothing: its samples one by one, so that only who is at fault fails.
        Where memory was short every other sample's state leaves the device first."""
        logger.warning("step raised", extra={"jobs": [entry.id for entry in entries], "error": one_line(error)})
        short = isinstance(error, OutOfMemory)
        if short:
            self.out_of_memory += 1
            if len(entries) > 1:
                self._scheduler.out_of_memory(entries)
        elif len(entries) == 1:
            self._fail_by(entries[0], error)
            return 0.0
        seconds = 0.0
        for entry in entries:
            if entry.id not in self._flights:  # left meanwhile
                continue
            self._stepping = [entry]
            others = [sample_id for sample_id in self._flights if sample_id != entry.id] if short else []
            try:
                stepped = await self._group.step(StepRequest([entry.id], others))
            except GroupLost:
                raise
            except Exception as alone:
                self._fail_by(entry, alone)
            else:
                seconds += await self._stepped([entry], stepped, {})
        return seconds

    async def _stepped(self, entries: list[Entry], stepped: StepResult, save: dict[str, str]) -> float:
        """What follows from a forward pass; the seconds that the ranks took."""
        self.steps += 1
        self.advanced += len(entries)
        self._scheduler.stepped(entries, stepped.seconds)
        for entry in entries:
            if entry.id in stepped.failed:
                self._fail(entry, "not_finite", stepped.failed[entry.id])
            else:
                await self._advanced(entry, stepped.seconds, saved=entry.id in save)
        return stepped.seconds

    async def _advanced(self, entry: Entry, seconds: float, saved: bool) -> None:
        entry.step += 1
        flight = self._flights.get(entry.id)
        if flight is None:  # left during the step
            return
        now = time.monotonic()
        took, flight.last_step = now - flight.last_step, now
        flight.step_s = took if flight.step_s is None else flight.step_s + _NEWEST * (took - flight.step_s)
        flight.unsaved_s = 0.0 if saved else flight.unsaved_s + seconds
        left = flight.step_s * (entry.steps - entry.step)
        flight.events.put_nowait(Progress("denoise", entry.step, entry.steps, left))
        if entry.finished:
            await self._finish(flight)

    async def _finish(self, flight: _Flight) -> None:
        self._scheduler.remove(flight.entry.id)
        latents = await self._group.latents(flight.entry.id)
        flight.events.put_nowait(Denoised(latents, time.monotonic() - flight.admitted))

    async def _move_away(self) -> None:
        """Hand out the samples that are not to be stepped here, or not now."""
        urgent = self._seats.next()
        order = self._scheduler.order(time.time())
        for flight in list(self._flights.values()):
            entry = flight.entry
            if entry.id not in self._scheduler:
                continue
            if entry.finished:  # it was when it came
                await self._finish(flight)
            elif self.leaving or not self._can_step(entry):
                await self._move(flight)
            elif urgent is not None and self._yielding is None and entry is order[-1] and self._yields(entry, urgent):
                self._yielding = entry.id
                await self._move(flight)

    async def _move(self, flight: _Flight) -> None:
        entry = flight.entry
        self._scheduler.remove(entry.id)
        state = await self._group.save(entry.id) if entry.step != flight.came_at else None
        flight.events.put_nowait(Moved(state, entry.high_noise, time.monotonic() - flight.admitted))

    def _can_step(self, entry: Entry) -> bool:
        return self._experts is None or ("transformer" if entry.high_noise else "transformer_2") in self._experts

    def _yields(self, entry: Entry, urgent: Claim) -> bool:
        """Whether a sample gives its seat to one that waits for it: only to a more urgent class."""
        return entry.priority > urgent.priority and entry.effective_deadline > time.time()

    def _save_to(self, sample_id: str) -> str | None:
        """Where to save a sample after this step; None if not now."""
        flight = self._flights.get(sample_id)
        if flight is None or not self._stage.checkpoint_s or flight.unsaved_s < self._stage.checkpoint_s:
            return None
        return flight.ticket.state_prefix

    def _effective_deadline(self, ticket: SampleRequest) -> float:
        return (ticket.created_at or time.time()) + float(getattr(self._ageing, ticket.priority))

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

    def lose(self, error: GroupLost) -> None:
        """The group cannot go on: everybody inside hears it, once, and which step they were in."""
        if self.reason is not None:
            return
        self.reason = str(error)
        logger.error("group lost", extra={"reason": self.reason, "jobs": list(self._flights)})
        suspects = set() if error.host else {entry.id for entry in self._stepping}
        for sample_id, flight in self._flights.items():
            step = flight.entry.step + 1 if sample_id in suspects else None
            flight.events.put_nowait(JobFailed("group_lost", self.reason, retryable=True, step=step))
        self._seats.close()
        self.lost.set()
        self._work.set()
