"""The dispatcher: leases jobs from the store, drives each through a pipeline, and records how it went.

Knows nothing of Ray: the pipeline is a callable that yields events. Any number of dispatchers share one store.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy.exc import SQLAlchemyError

from serve_app import config
from serve_app.errors import JobFailed, one_line
from serve_app.events import Done, Event, Progress
from serve_app.jobs.store import JobStore
from serve_app.jobs.tables import Job
from serve_app.logs import get_logger
from serve_app.storage import Storage

logger = get_logger(__name__)

Runner = Callable[[dict[str, Any]], AsyncGenerator[Event, None]]
"""Makes the video of a job: {"id", "attempt", "params", "prefix"} to its events. Closing the generator cancels it."""

# Between two writes of progress, in seconds: what a watching person can tell apart, and a database never notices.
PROGRESS_S = 0.25
# After the pipeline could not be reached, before the next job tries.
UNAVAILABLE_S = 2.0
_GARBAGE_S = 5.0
# The store is away, not wrong: asyncpg raises OSError when it cannot connect.
_STORE_AWAY = (SQLAlchemyError, OSError)


class PipelineUnavailable(Exception):
    """The pipeline cannot be reached at all, which is no job's fault: jobs wait and lose no attempt."""


@dataclass(eq=False)
class _Run:
    """One attempt that is under way here."""

    job: Job
    task: asyncio.Task[None] | None = None
    entered: bool = False
    verdict: Literal["cancelled", "lost", "stopping"] | None = None
    latest: Progress | None = None
    """What has not been written yet."""
    written_at: float = 0.0
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def end(self, verdict: Literal["cancelled", "lost", "stopping"]) -> None:
        """Cut the run off, once. A task that has not begun looks at the verdict itself."""
        if self.verdict is None:
            self.verdict = verdict
            if self.entered and self.task is not None:
                self.task.cancel()


class Dispatcher:
    """Keeps up to `options.running_jobs` jobs running until stopped.

    Args:
        store: a started job store.
        storage: where outputs of superseded runs are removed from.
        run: see `Runner`. `JobFailed` decides by itself whether another attempt is made; `PipelineUnavailable` puts
            the job back; any other exception fails it as `internal_error`.
    """

    def __init__(self, store: JobStore, storage: Storage, run: Runner, options: config.Dispatcher) -> None:
        self.owner = f"dispatcher-{secrets.token_hex(8)}"
        self._store = store
        self._storage = storage
        self._run = run
        self._options = options
        self._runs: dict[str, _Run] = {}
        self._wake = asyncio.Event()
        self._stopping = False
        self._loop_task: asyncio.Task[None] | None = None
        self._renewed_at = time.monotonic()
        self._collected_at = float("-inf")
        self._paused_until = 0.0
        self._away = 0

    @property
    def running(self) -> int:
        """Jobs under way here."""
        return len(self._runs)

    def start(self) -> None:
        """Begin, as a task of the running event loop."""
        self._loop_task = asyncio.create_task(self._loop(), name=self.owner)

    def wake(self) -> None:
        """Look at the store now rather than at the next poll."""
        self._wake.set()

    def check(self) -> None:
        """Raises whatever ended the loop, if it ended without being told to."""
        task = self._loop_task
        if task is None or not task.done() or self._stopping:
            return
        raise RuntimeError("the dispatcher's loop has ended") from (None if task.cancelled() else task.exception())

    async def stop(self) -> None:
        """Take no more jobs and hand those that run back to the queue, where they keep their place."""
        self._stopping = True
        self.wake()
        if self._loop_task is not None:
            await asyncio.wait([self._loop_task])
        for run in self._runs.values():
            run.end("stopping")
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
                await self._claim()
                await self._collect()
                self._away = 0
            except _STORE_AWAY as error:
                # Running jobs go on: their leases outlive a short outage, and the fence settles a long one.
                self._away += 1
                pause = max(pause, min(0.1 * 2**self._away, 5))
                logger.warning("store unreachable", extra={"error": one_line(error), "retry_in_s": pause})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    async def _heartbeat(self) -> None:
        """Renew the leases in time; end what was cancelled, deleted or taken over; write what progress is pending."""
        held = {run.job.id: run.job.attempt for run in self._runs.values() if run.verdict is None}
        now = time.monotonic()
        if now - self._renewed_at >= self._options.lease_s / 3:
            still = await self._store.renew(held, self._options.lease_s)
            self._renewed_at = now
        else:
            still = await self._store.check(held)
        for run in list(self._runs.values()):
            # Judge only what was asked about: a job may have been claimed, or have ended, meanwhile.
            if held.get(run.job.id) != run.job.attempt or run.verdict is not None:
                continue
            if run.job.id not in still:
                run.end("lost")
            elif still[run.job.id]:
                run.end("cancelled")
            elif run.latest is not None:
                await self._write_progress(run)

    async def _claim(self) -> None:
        while not self._stopping and len(self._runs) < self._options.running_jobs:
            if time.monotonic() < self._paused_until:
                return
            job = await self._store.claim(self.owner, self._options.lease_s, self._options.max_attempts)
            if job is None:
                return
            logger.info("claimed", extra={"job": job.id, "attempt": job.attempt, "owner": self.owner})
            run = _Run(job)
            self._runs[job.id] = run
            run.task = asyncio.create_task(self._drive(run), name=job.id)
            run.task.add_done_callback(lambda _, run=run: self._ended(run))  # type: ignore[misc]

    def _ended(self, run: _Run) -> None:
        if self._runs.get(run.job.id) is run:
            del self._runs[run.job.id]
        assert run.task is not None
        if not run.task.cancelled() and (error := run.task.exception()) is not None:
            logger.error("run broke", extra={"job": run.job.id, "error": one_line(error)}, exc_info=error)
        self.wake()

    async def _collect(self) -> None:
        """Remove outputs that nobody will ask for."""
        if time.monotonic() - self._collected_at < min(_GARBAGE_S, self._options.poll_s):
            return
        self._collected_at = time.monotonic()
        items = await self._store.garbage()
        try:
            for item in items:
                if removed := await self._storage.delete_prefix(item.prefix):
                    logger.info("outputs removed", extra={"prefix": item.prefix, "objects": removed})
        except OSError as error:
            # The rows stay, so it is tried again.
            logger.warning("outputs not removed yet", extra={"prefix": item.prefix, "error": one_line(error)})
            return
        if items:
            await self._store.forget_garbage(items)

    async def _drive(self, run: _Run) -> None:
        run.entered = True
        job = run.job
        began = time.monotonic()
        try:
            if run.verdict is not None:
                raise asyncio.CancelledError
            async with aclosing(self._run(_spec(job))) as events:
                done = await self._follow(run, events)
        except asyncio.CancelledError:
            if run.verdict is None:  # the event loop is going down; the lease will run out
                raise
            await self._cut_off(run)
            return
        except PipelineUnavailable as error:
            self._paused_until = time.monotonic() + UNAVAILABLE_S
            logger.warning("pipeline unavailable", extra={"job": job.id, "error": one_line(error)})
            await self._record(run, lambda: self._store.release(job.id, job.attempt))
            return
        except JobFailed as error:
            await self._failed(run, error)
            return
        except Exception as error:
            # Ray hands an exception over inside its own, with the original as `cause`.
            cause = getattr(error, "cause", None)
            if not isinstance(cause, JobFailed):
                logger.exception("job broke the pipeline", extra={"job": job.id, "attempt": job.attempt})
                cause = JobFailed("internal_error", f"An internal error ended this video: {one_line(error)}")
            await self._failed(run, cause)
            return
        if await self._record(run, lambda: self._store.complete(job.id, job.attempt, done)):
            logger.info("completed", extra={"job": job.id, "attempt": job.attempt, "seconds": _since(began)})

    async def _follow(self, run: _Run, events: AsyncGenerator[Event, None]) -> Done:
        async for event in events:
            if isinstance(event, Done):
                return event
            run.latest = event
            # A step that is not written now is written by the next heartbeat, unless a newer one replaces it.
            if event.step in (0, event.steps) or time.monotonic() - run.written_at >= PROGRESS_S:
                with suppress(*_STORE_AWAY):
                    await self._write_progress(run)
        raise JobFailed("internal_error", "The pipeline ended without a video.")

    async def _write_progress(self, run: _Run) -> None:
        async with run.writing:
            progress, run.latest = run.latest, None
            if progress is None:
                return
            run.written_at = time.monotonic()
            took_effect = await self._store.progress(run.job.id, run.job.attempt, progress)
        if not took_effect:
            run.end("lost")

    async def _failed(self, run: _Run, error: JobFailed) -> None:
        job, options = run.job, self._options
        logger.warning(
            "attempt failed",
            extra={"job": job.id, "attempt": job.attempt, "code": error.code, "error": error.message},
        )
        if not error.retryable:
            await self._record(run, lambda: self._store.fail(job.id, job.attempt, error.code, error.message))
            return
        delay_s = min(options.retry_s * 2**job.failures, 60)
        await self._record(
            run,
            lambda: self._store.retry(
                job.id, job.attempt, error.code, error.message, max_attempts=options.max_attempts, delay_s=delay_s
            ),
        )

    async def _cut_off(self, run: _Run) -> None:
        job = run.job
        logger.info("run ended early", extra={"job": job.id, "attempt": job.attempt, "verdict": run.verdict})
        if run.verdict == "cancelled":
            message = "Cancelled while it ran."
            await self._record(run, lambda: self._store.fail(job.id, job.attempt, "cancelled", message))
        elif run.verdict == "stopping":
            await self._record(run, lambda: self._store.release(job.id, job.attempt))
        else:
            await self._remove_outputs(job)

    async def _record(self, run: _Run, write: Callable[[], Awaitable[bool]]) -> bool:
        """Write how a run ended, for as long as it takes the store to come back. False if it was superseded."""
        delay = 0.1
        while True:
            try:
                took_effect = await write()
                break
            except asyncio.CancelledError:
                # The heartbeat saw a cancel or a takeover while we wrote. If the write went through, it stands; if
                # not, the verdict is carried out now.
                if run.verdict is None:
                    raise
                await self._cut_off(run)
                return False
            except _STORE_AWAY as error:
                if self._stopping:
                    logger.warning("gave up recording", extra={"job": run.job.id, "error": one_line(error)})
                    return False
                await asyncio.sleep(delay)
                delay = min(2 * delay, 5)
        if not took_effect:
            logger.info("superseded", extra={"job": run.job.id, "attempt": run.job.attempt})
            await self._remove_outputs(run.job)
        return took_effect

    async def _remove_outputs(self, job: Job) -> None:
        """Remove what a run stored that is not, or no longer, the job's: at once here, later by the garbage rows."""
        try:
            current = await self._store.get(job.id)
            if current is None:
                await self._storage.delete_prefix(f"videos/{job.id}")
            elif current.attempt != job.attempt:
                await self._storage.delete_prefix(job.prefix)
        except _STORE_AWAY as error:
            logger.warning("outputs not removed yet", extra={"job": job.id, "error": one_line(error)})


def _spec(job: Job) -> dict[str, Any]:
    return {"id": job.id, "attempt": job.attempt, "params": job.params, "prefix": job.prefix}


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
