"""The dispatcher, which leases jobs from the store, runs each through a pipeline, and keeps the leases alive.

Knows nothing of Ray: the pipeline is a callable that yields events. Any number of dispatchers share one store.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from serve_app import config
from serve_app.clock import CLOCK, Clock
from serve_app.db.database import STORE_AWAY
from serve_app.dispatch.generation import Gate
from serve_app.dispatch.janitor import Janitor
from serve_app.dispatch.run import Run, Runner
from serve_app.errors import one_line
from serve_app.jobs.store import JobStore
from serve_app.logs import get_logger
from serve_app.storage import Storage

logger = get_logger(__name__)

# Seconds before the next job tries, after the pipeline could not be reached.
UNAVAILABLE_S = 2.0


class Broker(Protocol):
    """A messenger between whoever creates jobs and the dispatchers, such as `serve_app.dispatch.rabbitmq.RabbitMQ`."""

    poll_s: float
    """Seconds between two looks at the store that no message asked for."""
    heard: Callable[[], object] | None
    """A function that is called when a message has come."""

    @property
    def connected(self) -> bool:
        """Return whether the broker was there when last heard of."""
        ...

    def take_messages(self) -> list[Any]:
        """Return the messages that have come, each to be handed to `settle`."""
        ...

    async def settle(self, messages: Sequence[Any], done: int) -> None:
        """Acknowledge the first `done` messages and hand the rest back."""
        ...

    async def listen_for(self, count: int) -> None:
        """Take up to `count` messages at a time, or none."""
        ...

    async def is_empty(self) -> bool:
        """Return whether the broker holds no message."""
        ...

    async def announce(self, video_ids: Sequence[str]) -> bool:
        """Announce jobs; return whether dispatchers will hear of all of them."""
        ...


class Dispatcher:
    """Keeps up to `options.running_jobs` jobs running until stopped.

    Args:
        store: a started job store.
        storage: the storage from which outputs of superseded runs are removed.
        run: the pipeline (see `Runner`). Its `JobFailed` says whether another attempt is made; `PipelineUnavailable`
            puts the job back; any other exception fails it as `internal_error`.
        options: how many jobs run, how long leases are, and how often a job is tried.
        broker: announces waiting jobs; without one the store is asked every `options.poll_s`.
        clock: the clock by which the dispatcher waits.
        gate: says whether its generation may lease jobs; without one it may.
    """

    def __init__(
        self,
        store: JobStore,
        storage: Storage,
        run: Runner,
        options: config.DispatcherConfig,
        broker: Broker | None = None,
        clock: Clock = CLOCK,
        gate: Gate | None = None,
    ) -> None:
        self.owner = f"dispatcher-{secrets.token_hex(8)}"
        self._store = store
        self._storage = storage
        self._janitor = Janitor(store, storage, options.poll_s, clock)
        self._runner = run
        self._options = options
        self._broker = broker
        self._clock = clock
        self._gate = gate or Gate(store, "", 0)
        self._runs: dict[str, Run] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._loop_task: asyncio.Task[None] | None = None
        self._renewed_at = self._clock.monotonic()
        self._paused_until = 0.0
        self._reap_from = 0.0
        self._must_look = True
        """True when the store may hold a job that nobody announces."""
        self._looked_at = float("-inf")
        self._jobs_paused = False
        self._away = 0

    @property
    def running(self) -> int:
        """The number of jobs that run here."""
        return len(self._runs)

    def start(self) -> None:
        """Begin, as a task of the running event loop."""
        if self._broker is not None:
            self._broker.heard = self._wake.set
        self._loop_task = asyncio.create_task(self._loop(), name=self.owner)
        self._janitor.start()

    def wake(self) -> None:
        """Look at the store now rather than at the next poll."""
        self._must_look = True
        self._wake.set()

    def raise_if_ended(self) -> None:
        """Raise RuntimeError, with its cause, if the loop or the janitor has ended without being told to."""
        task = self._loop_task
        if self._stopping or task is None:
            return
        if task.done():
            raise RuntimeError("the dispatcher's loop has ended") from (None if task.cancelled() else task.exception())
        self._janitor.raise_if_ended()

    async def stop(self) -> None:
        """Take no more jobs, and hand running ones back to the queue, where they keep their place."""
        self._stopping = True
        self.wake()
        if self._loop_task is not None:
            await asyncio.wait([self._loop_task])
        if self._broker is not None:
            await self._broker.listen_for(0)
        await self._janitor.stop()
        for run in self._runs.values():
            run.stop()
        tasks = [run.task for run in self._runs.values() if run.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=10)
        logger.info("stopped", extra={"owner": self.owner})

    async def _loop(self) -> None:
        logger.info("started", extra={"owner": self.owner, "running_jobs": self._options.running_jobs})
        while not self._stopping:
            self._wake.clear()
            pause = self._options.poll_s
            try:
                await self._heartbeat()
                await self._look_at_gate()
                reap = not self._away and self._clock.monotonic() >= self._reap_from
                await self._store.sweep(self._options, reap=reap)
                await self._learn_paused()
                await self._claim()
                await self._announce()
                if self._away:
                    # No dispatcher could renew meanwhile: the first to come back must not take the others for dead.
                    self._reap_from = self._clock.monotonic() + self._options.lease_s
                self._away = 0
            except STORE_AWAY as error:
                self._must_look = True
                if self._broker is not None:
                    await self._broker.listen_for(0)
                # Running jobs go on: leases outlive a short outage, and after a long one the attempt number decides.
                self._away += 1
                pause = max(pause, min(0.1 * 2**self._away, 5))
                logger.warning("store unreachable", extra={"error": one_line(error), "retry_in_s": pause})
            await self._clock.wait(self._wake, pause)

    async def _heartbeat(self) -> None:
        """Renew leases in time, end runs that were cancelled, deleted or taken over, and write pending progress."""
        held = {run.job.id: run.job.attempt for run in self._runs.values() if run.verdict is None}
        now = self._clock.monotonic()
        if now - self._renewed_at >= self._options.lease_s / 3:
            still = await self._store.renew(held, self._options.lease_s)
            self._renewed_at = now
        else:
            still = await self._store.still_held(held)
        for run in list(self._runs.values()):
            # Judge only the runs that were asked about: one may have begun or ended meanwhile.
            if held.get(run.job.id) != run.job.attempt or run.verdict is not None:
                continue
            if run.job.id not in still:
                run.end("lost")
            elif still[run.job.id]:
                run.end("cancelled")
            elif run.latest is not None:
                await run.write_progress()

    async def _look_at_gate(self) -> None:
        """Learn whether this generation leases jobs. If it no longer does, hand running jobs back after a while."""
        was_open = self._gate.open
        await self._gate.look()
        if self._gate.open and not was_open:
            self._must_look = True
        if self._gate.drained:
            for run in list(self._runs.values()):
                run.end("stopping")

    @property
    def _free_places(self) -> int:
        """The number of jobs that could begin now."""
        if self._stopping or self._jobs_paused or not self._gate.open or self._clock.monotonic() < self._paused_until:
            return 0
        return max(self._options.running_jobs - len(self._runs), 0)

    async def _learn_paused(self) -> None:
        """Ask the store whether jobs are paused. The claim asks again; this keeps messages from being taken."""
        held, self._jobs_paused = self._jobs_paused, await self._store.paused_since() is not None
        if held and not self._jobs_paused:
            self._must_look = True

    async def _claim(self) -> None:
        """Begin as many jobs as there are free places, if there is a reason to look at the store."""
        broker = self._broker
        if broker is None:
            await self._fill()
            return
        messages = broker.take_messages()
        # Each job that begins settles one message; if no job is left, all are settled.
        done = 0
        try:
            overdue = self._clock.monotonic() - self._looked_at >= (broker.poll_s if broker.connected else 0)
            if messages or self._must_look or overdue:
                begun, more = await self._fill()
                done = begun if more else len(messages)
        finally:
            # First, so that a message that is handed back does not return to a dispatcher without a free place.
            await broker.listen_for(self._free_places)
            await broker.settle(messages, done)

    async def _fill(self) -> tuple[int, bool]:
        """Begin jobs; return how many, and whether more may wait."""
        begun = 0
        while self._free_places:
            self._must_look = False
            self._looked_at = self._clock.monotonic()
            job = await self._store.claim(self.owner, self._options.lease_s, self._gate.name)
            if job is None:
                return begun, False
            begun += 1
            logger.info("claimed", extra={"job": job.id, "attempt": job.attempt, "owner": self.owner})
            run = Run(job, self._store, self._storage, self._runner, self._options, self._pause, self._clock)
            self._runs[job.id] = run
            run.start().add_done_callback(lambda _, run=run: self._ended(run))  # type: ignore[misc]
        self._must_look = True
        return begun, True

    async def _announce(self) -> None:
        """Announce waiting jobs that were not announced, or whose announcement may be lost."""
        broker = self._broker
        if broker is None or self._jobs_paused or not broker.connected:
            return
        again_s = broker.poll_s if await broker.is_empty() else None
        if video_ids := await self._store.to_announce(again_s):
            await broker.announce(video_ids)

    def _pause(self) -> None:
        self._paused_until = self._clock.monotonic() + UNAVAILABLE_S

    def _ended(self, run: Run) -> None:
        if self._runs.get(run.job.id) is run:
            del self._runs[run.job.id]
        assert run.task is not None
        if not run.task.cancelled() and (error := run.task.exception()) is not None:
            logger.error("run broke", extra={"job": run.job.id, "error": one_line(error)}, exc_info=error)
        # A place is free for another job, and this one's next attempt may be due at once.
        self.wake()
