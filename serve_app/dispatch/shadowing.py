"""Shadow mode: one copy of a completed job at a time, made by the canary while nothing waits, and compared.

Same revision and same request must give the same bits. A copy is made at the lowest priority and never recorded as a
job. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator
from contextlib import aclosing, suppress
from dataclasses import replace

from serve_app import config
from serve_app.clock import CLOCK, Clock
from serve_app.db.database import STORE_AWAY
from serve_app.db.rollouts import ShadowOutcome
from serve_app.db.tables import Job
from serve_app.dispatch.loops import Loops, NamedLoops
from serve_app.dispatch.pipelines import Pipelines
from serve_app.dispatch.run import PipelineUnavailable, spec_of
from serve_app.errors import JobFailed, one_line
from serve_app.events import Done
from serve_app.job_spec import JobSpec
from serve_app.jobs.shadows import shadow_prefix
from serve_app.jobs.store import JobStore
from serve_app.logs import get_logger
from serve_app.metrics import catalog as metrics
from serve_app.storage import Storage

logger = get_logger(__name__)

# A group takes a copy for a job that begins to wait this much later: anything else goes first.
_LATER_S = 10 * 365 * 86400.0
# A copy may take this many times as long as its original.
_TIMES = 20


class Shadowing(Loops):
    """A loop that has copies made until stopped.

    Args:
        store: a started job store.
        storage: the storage of the originals, and of the copies until they are compared.
        pipelines: the pipelines by name.
        options: whether copies are made, and the seconds between two looks.
        clock: the clock by which it waits.
    """

    def __init__(
        self,
        store: JobStore,
        storage: Storage,
        pipelines: Pipelines,
        options: config.DispatcherConfig,
        clock: Clock = CLOCK,
    ) -> None:
        self._store = store
        self._storage = storage
        self._pipelines = pipelines
        self._options = options
        self._clock = clock

    def _loops(self) -> NamedLoops:
        return {"shadowing": self._loop} if self._options.canary.shadow else {}

    async def _loop(self) -> None:
        while True:
            begun = None
            try:
                begun = await self._store.begin_shadow()
                if begun is not None:
                    await self._copy(*begun)
            except asyncio.CancelledError:
                if begun is not None:
                    with suppress(*STORE_AWAY):
                        await self._store.drop_shadow(begun[0].id, begun[1], away=False)
                raise
            except STORE_AWAY as error:
                logger.warning("no copy made", extra={"error": one_line(error)})
            if begun is None:
                await self._clock.sleep(self._options.poll_s)

    async def _copy(self, job: Job, pipeline: str) -> None:
        """Have a job copied, and record how the copy compares."""
        spec = replace(
            spec_of(job),
            prefix=shadow_prefix(job.id),
            attempt=1,
            state_prefix=None,
            priority="batch",
            created_at=time.time() + _LATER_S,
            losses=0,
            pipeline=pipeline,
        )
        began = self._clock.monotonic()
        took = None if job.started_at is None or job.completed_at is None else job.completed_at - job.started_at
        try:
            async with asyncio.timeout(self._options.canary.start_within_s + _TIMES * (took or 0)):
                done = await self._made(spec)
        except PipelineUnavailable:
            await self._store.drop_shadow(job.id, pipeline, away=True)
            await self._clock.sleep(self._options.poll_s)
            return
        except Exception as error:  # of whatever kind: a job would have failed
            said = f"{error.code}: {error.message}" if isinstance(error, JobFailed) else one_line(error)
            await self._store.end_shadow(job.id, pipeline, "failed", said)
            metrics.shadows.inc(outcome="failed")
            logger.warning("copy failed", extra={"job": job.id, "pipeline": pipeline, "error": said})
        else:
            seconds = self._clock.monotonic() - began
            outcome = await self._compared(job, done)
            await self._store.end_shadow(job.id, pipeline, outcome, None, seconds, took)
            metrics.shadows.inc(outcome=outcome)
            logger.info("copied", extra={"job": job.id, "pipeline": pipeline, "outcome": outcome})
        await self._storage.delete_prefix(shadow_prefix(job.id))

    async def _made(self, spec: JobSpec) -> Done:
        async with aclosing(self._pipelines(spec)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return event
        raise JobFailed("internal_error", "The pipeline ended without a video.")

    async def _compared(self, job: Job, done: Done) -> ShadowOutcome:
        if done.revision is None or done.revision != job.revision:
            return "other_revision"
        ours, theirs = [await self._storage.get(outputs["video"]) for outputs in (done.outputs, job.outputs)]
        return "equal" if await asyncio.to_thread(same_pictures, ours, theirs) else "different"


def same_pictures(first: bytes, second: bytes) -> bool:
    """Return whether two videos are equal to the bit, as files or in all that is encoded of their pictures.

    What an mp4 says about itself, such as the name of its maker, may differ.
    """
    if first == second:
        return True
    import av

    try:
        return list(_packets(first)) == list(_packets(second))
    except av.FFmpegError:
        return False


def _packets(video: bytes) -> Iterator[bytes]:
    import av

    with av.open(io.BytesIO(video)) as container:
        for packet in container.demux(video=0):
            yield bytes(packet)
