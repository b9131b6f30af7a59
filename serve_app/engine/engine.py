"""The step engine: holds the samples of one group and asks the group for one denoising step after the other.

Between two steps everything may change: samples join, finish and leave. Runs in the coordinator's event loop and does
no math itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import ray

from serve_app.config import Config
from serve_app.engine.group import Group, GroupLost
from serve_app.engine.scheduler import Entry, Scheduler
from serve_app.errors import JobFailed
from serve_app.events import Progress
from serve_app.logs import get_logger
from serve_app.request import Params

log = get_logger(__name__)

# Weight of the newest step in the running mean of step times: follows batch mates that come and go.
_NEWEST = 0.3


@dataclass(frozen=True)
class Admission:
    """A sample that asks to be denoised. Embeddings are float arrays [tokens, dim]; `negative` is None unguided."""

    id: str
    params: Params
    positive: np.ndarray
    negative: np.ndarray | None


@dataclass(frozen=True)
class Denoised:
    """The end of a sample: a reference to its latents, and the seconds from admission to here."""

    latents: ray.ObjectRef
    seconds: float


@dataclass
class _Flight:
    """A sample in the engine: what its listener has yet to hear, and how long its steps take."""

    entry: Entry
    events: asyncio.Queue[Progress | Denoised | Exception] = field(default_factory=asyncio.Queue)
    admitted: float = field(default_factory=time.monotonic)
    last_step: float = field(default_factory=time.monotonic)
    step_s: float | None = None


class Engine:
    """Drives a group.

    Args:
        group: the started ranks.
        config: the deployment's configuration.
    """

    def __init__(self, group: Group, config: Config) -> None:
        stage = config.denoiser
        self._group = group
        self._scheduler = Scheduler(stage.samples_per_step, stage.tokens_per_step)
        self._flights: dict[str, _Flight] = {}
        self._room = asyncio.Semaphore(stage.resident_samples)
        self._seats: set[str] = set()
        self._work = asyncio.Event()
        self.lost = asyncio.Event()
        """Set when the group cannot go on; the owner must replace it."""
        self.reason: str | None = None
        self.steps = 0
        """Forward passes so far; `advanced` counts the samples in them."""
        self.advanced = 0
        self._task = asyncio.create_task(self._run(), name="engine")

    @asynccontextmanager
    async def seat(self, sample_id: str) -> AsyncIterator[None]:
        """Room for one sample; waits while `denoiser.resident_samples` are in. Leaving it, for whatever reason and at
        whatever moment, frees the sample.

        Taken before the admission, not in it: admissions are batched, and one that waited for room would keep its
        batch mates from being heard, who then would never make room.

        Raises:
            JobFailed: the sample has a seat already.
        """
        await self._room.acquire()
        if sample_id in self._seats:
            self._room.release()
            raise JobFailed("duplicate", f"sample {sample_id} is being denoised already")
        self._seats.add(sample_id)
        try:
            yield
        finally:
            self._seats.discard(sample_id)
            self._room.release()
            await self._leave(sample_id)

    async def admit(self, admission: Admission) -> None:
        """Take in a sample that has a seat.

        Raises:
            JobFailed: the group is lost, or the seat was left meanwhile.
        """
        if self.reason is not None:
            raise JobFailed("group_lost", self.reason, retryable=True)
        params = admission.params
        try:
            admitted = await self._group.admit(admission.id, params, admission.positive, admission.negative)
            if admission.id not in self._seats:
                await self._group.drop([admission.id])
                raise JobFailed("cancelled", f"sample {admission.id} was left before it began")
        except GroupLost as error:
            self.lose(error)
            raise JobFailed("group_lost", str(error), retryable=True) from error
        entry = Entry(
            id=admission.id,
            latent_shape=params.latent_shape,
            guided=params.guided,
            tokens=admitted.tokens,
            steps=params.num_inference_steps,
            boundary=admitted.boundary,
        )
        self._flights[admission.id] = _Flight(entry)
        self._scheduler.add(entry)
        self._work.set()

    async def events(self, sample_id: str) -> AsyncIterator[Progress | Denoised]:
        """What happens to an admitted sample, up to its end.

        Raises:
            JobFailed: the sample failed.
        """
        flight = self._flights[sample_id]
        while True:
            event = await flight.events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, Denoised):
                return

    @property
    def resident(self) -> int:
        """Samples inside."""
        return len(self._flights)

    async def stop(self) -> None:
        """Stop stepping. Samples inside fail as retryable."""
        self._task.cancel()
        self.lose(GroupLost("the denoiser replica is shutting down"))

    async def _leave(self, sample_id: str) -> None:
        """Forget a sample, wherever it is; a step in flight ends first, then its memory is free."""
        if self._flights.pop(sample_id, None) is None:
            return
        self._scheduler.remove(sample_id)
        if self.reason is None:
            try:
                await self._group.drop([sample_id])
            except GroupLost as error:
                self.lose(error)

    async def _run(self) -> None:
        while self.reason is None:
            entries = self._scheduler.pick()
            if not entries:
                self._work.clear()
                await self._work.wait()
                continue
            try:
                stepped = await self._group.step([entry.id for entry in entries])
                self.steps += 1
                self.advanced += len(entries)
                for entry in entries:
                    if entry.id in stepped.failed:
                        self._fail([entry], stepped.failed[entry.id])
                    else:
                        await self._advanced(entry)
            except GroupLost as error:
                self.lose(error)
            except Exception as error:  # whatever the model raised: it concerns these samples, not the group
                log.warning("step failed", extra={"jobs": [e.id for e in entries], "error": repr(error)})
                self._fail(entries, (str(error).strip() or repr(error)).splitlines()[-1])

    async def _advanced(self, entry: Entry) -> None:
        entry.step += 1
        flight = self._flights.get(entry.id)
        if flight is None:  # left during the step
            return
        now = time.monotonic()
        took, flight.last_step = now - flight.last_step, now
        flight.step_s = took if flight.step_s is None else flight.step_s + _NEWEST * (took - flight.step_s)
        left = flight.step_s * (entry.steps - entry.step)
        flight.events.put_nowait(Progress("denoise", entry.step, entry.steps, left))
        if entry.finished:
            self._scheduler.remove(entry.id)
            latents = await self._group.latents(entry.id)
            flight.events.put_nowait(Denoised(latents, time.monotonic() - flight.admitted))

    def _fail(self, entries: list[Entry], reason: str) -> None:
        for entry in entries:
            self._scheduler.remove(entry.id)
            if (flight := self._flights.get(entry.id)) is not None:
                flight.events.put_nowait(JobFailed("step_failed", f"step {entry.step + 1}: {reason}"))

    def lose(self, error: GroupLost) -> None:
        """The group cannot go on: everybody inside hears it, once."""
        if self.reason is not None:
            return
        self.reason = str(error)
        log.error("group lost", extra={"reason": self.reason, "jobs": list(self._flights)})
        for flight in self._flights.values():
            flight.events.put_nowait(JobFailed("group_lost", self.reason, retryable=True))
        self.lost.set()
        self._work.set()
