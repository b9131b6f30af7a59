"""One attempt at a job, which drives the pipeline, writes progress, and records the end.

Knows nothing of Ray: the pipeline is a callable that yields events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Literal, cast

from serve_app import config
from serve_app.clock import CLOCK, Clock
from serve_app.config import Priority
from serve_app.db.database import STORE_AWAY
from serve_app.db.tables import CANCELLED, Job
from serve_app.errors import JobFailed, one_line
from serve_app.events import Done, Event, Progress
from serve_app.finish.plan import Finish
from serve_app.job_spec import JobSpec
from serve_app.jobs.store import JobStore
from serve_app.logs import get_logger
from serve_app.metrics import catalog as metrics
from serve_app.request import Params
from serve_app.storage import Storage

logger = get_logger(__name__)

Runner = Callable[[JobSpec], AsyncGenerator[Event, None]]
"""Makes the video of a job and yields its events. Closing the generator cancels it."""

Verdict = Literal["cancelled", "deadline", "lost", "stopping"]

# Seconds between two writes of progress: often enough for a watching person, rare enough for a database.
PROGRESS_S = 0.25
# Error code and message of a job whose run was cut off.
_CUT_OFF = {
    "cancelled": (CANCELLED, "Cancelled while it ran."),
    "deadline": ("deadline_exceeded", "Its deadline passed while it ran."),
}


class PipelineUnavailable(Exception):
    """A pipeline that cannot be reached at all. That is no job's fault: jobs wait and lose no attempt."""


def spec_of(job: Job) -> JobSpec:
    """Return what the pipeline needs to know of a claimed job."""
    return JobSpec(
        id=job.id,
        params=Params(**job.params),
        prefix=job.prefix,
        attempt=job.attempt,
        state_prefix=job.sample_prefix,
        priority=cast(Priority, job.priority),
        created_at=job.waits_since,
        losses=job.losses,
        pipeline=job.pipeline,
        finish=None if job.finish is None else Finish.model_validate(job.finish),
    )


class Run:
    """One attempt that runs here.

    Args:
        job: the job as claimed.
        store: a started job store.
        storage: the storage from which outputs are removed if the run is superseded.
        runner: the pipeline.
        options: how often a job is tried.
        pause: is called when the pipeline cannot be reached, before the job waits again.
        clock: the clock by which the run waits.
    """

    def __init__(
        self,
        job: Job,
        store: JobStore,
        storage: Storage,
        runner: Runner,
        options: config.DispatcherConfig,
        pause: Callable[[], None],
        clock: Clock = CLOCK,
    ) -> None:
        self.job = job
        self.verdict: Verdict | None = None
        self.latest: Progress | None = None
        """Progress that has not been written yet."""
        self.task: asyncio.Task[None] | None = None
        self._store = store
        self._storage = storage
        self._runner = runner
        self._options = options
        self._pause = pause
        self._clock = clock
        self._entered = False
        self._stopping = False
        self._resumed_step: int | None = None
        """The denoising step at which this attempt began, once it is known."""
        self._written_at = 0.0
        self._writing = asyncio.Lock()

    def start(self) -> asyncio.Task[None]:
        """Begin, as a task of the running event loop."""
        self.task = asyncio.create_task(self._drive(), name=self.job.id)
        return self.task

    def end(self, verdict: Verdict) -> None:
        """Cut the run off for a reason; the first one counts. A task that has not begun checks the verdict itself."""
        if self.verdict is None:
            self.verdict = verdict
            if self._entered and self.task is not None:
                self.task.cancel()

    def stop(self) -> None:
        """Hand the job back without waiting for anything that may take long."""
        self._stopping = True
        self.end("stopping")

    async def write_progress(self) -> None:
        """Write the progress that has not been written yet."""
        async with self._writing:
            progress, self.latest = self.latest, None
            if progress is None:
                return
            self._written_at = self._clock.monotonic()
            job = self.job
            took_effect = await self._store.progress(job.id, job.attempt, progress, self._resumed_step or 0)
        if not took_effect:
            self.end("lost")

    async def _drive(self) -> None:
        self._entered = True
        job, store = self.job, self._store
        began = self._clock.monotonic()
        try:
            if self.verdict is not None:
                raise asyncio.CancelledError
            done = await self._follow()
        except asyncio.CancelledError:
            if self.verdict is None:  # the event loop is going down; the lease will run out
                raise
            await self._cut_off()
            return
        except PipelineUnavailable as error:
            if await self._left_canary(error):
                return
            self._pause()
            logger.warning("pipeline unavailable", extra={"job": job.id, "error": one_line(error)})
            await self._record(lambda: store.release(job.id, job.attempt))
            return
        except JobFailed as error:
            await self._failed(error)
            return
        except Exception as error:
            # Ray hands an exception over inside its own, with the original as `cause`.
            cause = getattr(error, "cause", None)
            if not isinstance(cause, JobFailed):
                logger.exception("job broke the pipeline", extra={"job": job.id, "attempt": job.attempt})
                cause = JobFailed("internal_error", f"An internal error ended this video: {one_line(error)}")
            await self._failed(cause)
            return
        if await self._record(lambda: store.complete(job.id, job.attempt, done)):
            seconds = round(self._clock.monotonic() - began, 3)
            # The gateway's clock gave the time of creation.
            took = {"predicted_s": job.predicted_s, "took_s": round(time.time() - job.created_at, 3)}
            logger.info("completed", extra={"job": job.id, "attempt": job.attempt, "seconds": seconds, **took})
            self._measure(done, seconds)

    def _measure(self, done: Done, seconds: float) -> None:
        """Record how long a completed job took."""
        size = metrics.size_of(self.job.params["width"], self.job.params["height"])
        metrics.job_run_seconds.observe(seconds, size=size)
        for stage in metrics.STAGES:
            if stage in done.timings:
                metrics.stage_seconds.observe(done.timings[stage], stage=stage, size=size)
        metrics.gpu_seconds.inc(done.timings.get("denoise", 0.0) * self.job.ranks + done.finish_gpu_seconds)

    async def _follow(self) -> Done:
        """Follow the pipeline's events up to the video or the deadline; return the video."""
        with self._deadline() as disarm:
            async with aclosing(self._runner(spec_of(self.job))) as events:
                async for event in events:
                    if isinstance(event, Done):
                        # A video that is there in time is recorded, however long that takes.
                        disarm()
                        return event
                    await self._on_progress(event)
        raise JobFailed("internal_error", "The pipeline ended without a video.")

    @contextmanager
    def _deadline(self) -> Iterator[Callable[[], None]]:
        """End the run at its job's deadline, unless the block ends or the yielded function is called before."""
        job = self.job
        if job.deadline_at is None or job.started_at is None:
            yield lambda: None
            return
        # Both times are by the database's clock; this host's may differ.
        left_s = job.deadline_at - job.started_at
        timer = self._clock.call_later(left_s, lambda: self.end("deadline"))
        try:
            yield timer.cancel
        finally:
            timer.cancel()

    async def _on_progress(self, event: Progress) -> None:
        begins = event.stage == "denoise" and self._resumed_step is None
        if begins:
            self._resumed_step = event.step
        self.latest = event
        # The next heartbeat writes a step that is not written now, unless a newer one replaces it.
        if begins or event.step in (0, event.steps) or self._clock.monotonic() - self._written_at >= PROGRESS_S:
            with suppress(*STORE_AWAY):
                await self.write_progress()

    async def _failed(self, error: JobFailed) -> None:
        job, store = self.job, self._store
        metrics.attempts_failed.inc(reason=error.code)
        logger.warning(
            "attempt failed",
            extra={
                "job": job.id,
                "attempt": job.attempt,
                "code": error.code,
                "step": error.step,
                "error": error.message,
            },
        )
        if error.retryable:
            step = self._resumed_step or 0
            await self._record(lambda: store.retry(job.id, job.attempt, error, self._options, step))
        else:
            await self._record(lambda: store.fail(job.id, job.attempt, error.code, error.message))

    async def _cut_off(self) -> None:
        job, store = self.job, self._store
        logger.info("run ended early", extra={"job": job.id, "attempt": job.attempt, "verdict": self.verdict})
        if self.verdict == "lost":
            await self._remove_outputs()
        elif self.verdict == "stopping":
            await self._record(lambda: store.release(job.id, job.attempt))
        else:
            assert self.verdict is not None
            code, message = _CUT_OFF[self.verdict]
            await self._record(lambda: store.fail(job.id, job.attempt, code, message))

    async def _left_canary(self, error: PipelineUnavailable) -> bool:
        """Hand a job whose canary cannot be reached to the stable pipeline; return False if it stays where it is."""
        job = self.job
        if job.pipeline is None:
            return False
        try:
            moved = await self._store.leave_canary(job.id, job.attempt)
        except STORE_AWAY:
            return False
        if moved:
            extra = {"job": job.id, "pipeline": job.pipeline, "error": one_line(error)}
            logger.warning("canary unavailable, job moved", extra=extra)
        return moved

    async def _record(self, write: Callable[[], Awaitable[bool]]) -> bool:
        """Write how a run ended, again until the store is back. Return False if the run was superseded."""
        delay_s = 0.1
        while True:
            try:
                took_effect = await write()
                break
            except asyncio.CancelledError:
                # The heartbeat saw a cancel or a takeover during the write. If the write went through, it stands; if
                # not, the verdict is carried out now.
                if self.verdict is None:
                    raise
                await self._cut_off()
                return False
            except STORE_AWAY as error:
                if self._stopping:
                    logger.warning("gave up recording", extra={"job": self.job.id, "error": one_line(error)})
                    return False
                await self._clock.sleep(delay_s)
                delay_s = min(2 * delay_s, 5)
        if not took_effect:
            logger.info("superseded", extra={"job": self.job.id, "attempt": self.job.attempt})
            await self._remove_outputs()
        return took_effect

    async def _remove_outputs(self) -> None:
        """Remove files of the run that do not belong to the job: at once here, and later by the garbage rows."""
        job = self.job
        try:
            current = await self._store.get(job.id)
            if current is None:
                await self._storage.delete_prefix(f"videos/{job.id}")
                await self._storage.delete_prefix(job.state_prefix)
            elif current.attempt != job.attempt:
                await self._storage.delete_prefix(job.prefix)
        except STORE_AWAY as error:
            logger.warning("outputs not removed yet", extra={"job": job.id, "error": one_line(error)})
