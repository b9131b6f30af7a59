"""The step engine: holds the samples of one group and asks the group for one denoising step after the other.

Between two steps everything may change: samples join, overtake, finish, move to another group and leave. Runs in the
coordinator's event loop and does no math itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, get_args

from serve_app.config import Config, Priority
from serve_app.engine.admission_queue import AdmissionQueue, Candidate
from serve_app.engine.errors import GroupLost, NotAdmitting
from serve_app.engine.flight import Flight
from serve_app.engine.group import Group
from serve_app.engine.passes import Counters, Passes
from serve_app.engine.sample_request import Denoised, EncodedRequest, Moved, SampleRequest
from serve_app.engine.scheduler import Entry, Scheduler
from serve_app.errors import JobFailed, one_line
from serve_app.events import Progress
from serve_app.logs import get_logger
from serve_app.metrics import catalog as metrics

if TYPE_CHECKING:
    from serve_app.wan.weights.checkpoint import Expert

logger = get_logger(__name__)


class Engine:
    """Drives a group.

    Args:
        group: the started ranks.
        config: the deployment's configuration.
        experts: which experts the ranks hold; None is all.

    Attributes:
        lost: set when the group cannot go on; the owner must replace it.
        reason: why it cannot; None while it can.
        draining: whether samples are moved away rather than stepped; see `drain`.
    """

    def __init__(self, group: Group, config: Config, experts: tuple[Expert, ...] | None = None) -> None:
        stage = config.denoiser
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
        self._flights: dict[str, Flight] = {}
        self._passes = Passes(group, self._scheduler, self._flights, stage.checkpoint_s)
        self._admissions: set[asyncio.Future[None]] = set()
        """One for each sample that the ranks have been asked to take; done when they have answered."""
        self._admission_queue = AdmissionQueue(stage.resident_samples)
        self._yielding: str | None = None
        """The sample that was moved for a more urgent one, until it has left."""
        self._work = asyncio.Event()
        self.lost = asyncio.Event()
        self.reason: str | None = None
        self.draining = False
        self._task = asyncio.create_task(self._run(), name="engine")

    @property
    def counters(self) -> Counters:
        """Counts of what the engine has done so far."""
        return self._passes.counters

    @property
    def resident(self) -> int:
        """Number of samples inside."""
        return len(self._flights)

    @property
    def waiting(self) -> int:
        """Number of samples that wait for a place."""
        return self._admission_queue.waiting

    @property
    def tight(self) -> bool:
        """True while the ranks' memory is short, see `Pressure`."""
        return self._passes.pressure.tight

    def overview(self) -> list[dict[str, Any]]:
        """Return id, class and steps of each sample inside."""
        classes = get_args(Priority)
        return [
            {"id": one.id, "priority": classes[one.priority], "step": one.step, "steps": one.steps}
            for one in (flight.entry for flight in list(self._flights.values()))
        ]

    @asynccontextmanager
    async def place(self, request: SampleRequest) -> AsyncIterator[None]:
        """Hold a place for one sample; wait for it while `denoiser.resident_samples` are inside.

        Leaving the context, for whatever reason and at whatever moment, frees the sample.

        A place is taken before the admission, not in it. Admissions are batched: one that waited for a place would keep
        its batch mates from being answered, who then would never free theirs.

        Raises:
            JobFailed: the sample has a place already.
            NotAdmitting: `drain` was called, or the group is lost.
        """
        candidate = Candidate(request.id, get_args(Priority).index(request.priority), self._effective_deadline(request))
        self._work.set()  # a less urgent sample may have to give up its place
        await self._admission_queue.wait_for_place(candidate)
        try:
            yield
        finally:
            self._admission_queue.free_place(request.id)
            await self._remove(request.id)

    async def admit(self, encoded: EncodedRequest) -> None:
        """Take in a sample that has a place.

        Raises:
            NotAdmitting: the group is lost.
            JobFailed: the group was lost meanwhile, or the place was given up.
        """
        if self.reason is not None:
            raise NotAdmitting(self.reason)
        answered = asyncio.get_running_loop().create_future()
        self._admissions.add(answered)
        try:
            await self._admit(encoded)
        except GroupLost as error:
            self.lose(error)
            raise JobFailed("group_lost", str(error), retryable=True) from error
        finally:
            self._admissions.discard(answered)
            answered.set_result(None)

    async def _admit(self, encoded: EncodedRequest) -> None:
        request = encoded.request
        admitted = await self._group.admit(
            request.id, request.params, encoded.positive, encoded.negative, encoded.state
        )
        if self.reason is not None:  # the samples inside have been told; one that comes after that must be told too
            raise GroupLost(self.reason)
        if request.id not in self._admission_queue:
            await self._group.drop([request.id])
            raise JobFailed("cancelled", f"sample {request.id} was left before it began")
        if admitted.refused is not None:
            logger.warning("saved state not used", extra={"job": request.id, "reason": admitted.refused})
        entry = Entry(
            id=request.id,
            latent_shape=request.params.latent_shape,
            guided=request.params.guided,
            tokens=admitted.tokens,
            steps=admitted.steps,
            boundary=admitted.boundary,
            step=admitted.step,
            priority=get_args(Priority).index(request.priority),
            effective_deadline=self._effective_deadline(request),
            work=admitted.work,
            step_mib=admitted.step_mib,
            state_mib=admitted.state_mib,
            alone=request.alone,
        )
        self._flights[request.id] = Flight(request, entry, first_step=entry.step)
        self._scheduler.add(entry)
        self._work.set()

    def step_of(self, sample_id: str) -> int:
        """Return how many steps an admitted sample has behind it."""
        return self._flights[sample_id].entry.step

    async def events(self, sample_id: str) -> AsyncIterator[Progress | Denoised | Moved]:
        """Yield what happens to an admitted sample, up to its end here.

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

    def drain(self) -> None:
        """Move every sample away after the step in flight, and admit no more, until `stop_draining` is called."""
        self.draining = True
        self._admission_queue.close()
        self._work.set()

    def stop_draining(self) -> None:
        """Admit samples again."""
        self.draining = False
        self._admission_queue.open()

    def lose(self, error: GroupLost) -> None:
        """Give up the group: tell every sample inside, once, and which step it was in."""
        if self.reason is not None:
            return
        self.reason = str(error)
        logger.error("group lost", extra={"reason": self.reason, "jobs": list(self._flights)})
        suspects = set() if error.host else {entry.id for entry in self._passes.stepping}
        for sample_id, flight in self._flights.items():
            step = flight.entry.step + 1 if sample_id in suspects else None
            flight.events.put_nowait(JobFailed("group_lost", self.reason, retryable=True, step=step))
        self._admission_queue.close()
        self.lost.set()
        self._work.set()

    async def _remove(self, sample_id: str) -> None:
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
            self._passes.stepping = []
            began = time.monotonic()
            try:
                if self._admissions:
                    # Ranks take new samples as soon as their step ends. A step that is requested before they have
                    # answered would leave those samples out, and a step of others can be long.
                    await asyncio.wait(self._admissions)
                await self._move_away()
                now = time.time()
                entries = self._scheduler.pick(now)
                if entries:
                    seconds = await self._passes.step(entries, self._scheduler.parked_off_device(entries, now))
                    overhead = time.monotonic() - began - seconds
                    self.counters.overhead_s += overhead
                    metrics.step_overhead_seconds.inc(overhead)
                else:
                    self._work.clear()
                    await self._work.wait()
            except GroupLost as error:
                self.lose(error)
            except Exception as error:  # a defect of ours: if the loop just ended, every sample would wait for ever
                logger.exception("engine failed")
                self.lose(GroupLost(f"the engine failed: {one_line(error)}", host=True))

    async def _move_away(self) -> None:
        """Hand out the samples that are not to be stepped here, or not now."""
        urgent = self._admission_queue.next_candidate()
        order = self._scheduler.order(time.time())
        for flight in list(self._flights.values()):
            entry = flight.entry
            if entry.id not in self._scheduler:
                continue
            if entry.finished:  # it was when it came
                await self._passes.finish(flight)
            elif self.draining or not self._can_step(entry):
                await self._move(flight)
            elif urgent is not None and self._yielding is None and entry is order[-1] and self._yields(entry, urgent):
                self._yielding = entry.id
                await self._move(flight)

    async def _move(self, flight: Flight) -> None:
        entry = flight.entry
        self._scheduler.remove(entry.id)
        state = await self._group.save(entry.id) if entry.step != flight.first_step else None
        flight.events.put_nowait(Moved(state, entry.high_noise, flight.seconds, flight.group_s, flight.passes))

    def _can_step(self, entry: Entry) -> bool:
        return self._experts is None or ("transformer" if entry.high_noise else "transformer_2") in self._experts

    def _yields(self, entry: Entry, urgent: Candidate) -> bool:
        """Return whether a sample gives its place to one that waits: only to a more urgent class."""
        return entry.priority > urgent.priority and entry.effective_deadline > time.time()

    def _effective_deadline(self, request: SampleRequest) -> float:
        return (request.created_at or time.time()) + float(getattr(self._ageing, request.priority))
