"""Measures the queue, the store and the storage every few seconds, for metrics.

Every dispatcher measures them: the numbers are of what all share, so whoever reads them takes the largest.
"""

from __future__ import annotations

import asyncio

from serve_app.clock import CLOCK, Clock
from serve_app.db.database import STORE_AWAY
from serve_app.dispatch.loops import Loops, NamedLoops
from serve_app.jobs.store import JobStore
from serve_app.metrics import catalog as metrics
from serve_app.storage import Storage

# Seconds between two rounds: well below the time after which Ray forgets a gauge.
_PERIOD_S = 5.0
_QUEUE = (
    metrics.queued_jobs,
    metrics.queued_work_tflop,
    metrics.oldest_wait_seconds,
    metrics.queued_work_seconds,
    metrics.running_jobs,
    metrics.paused,
    metrics.canary_percent,
)
"""Gauges that are cleared while the store does not answer: an old number would look like a quiet queue."""


class Gauges(Loops):
    """Two loops, so that a storage that hangs does not hide the queue.

    Args:
        store: a started job store.
        storage: the storage of the videos.
        clock: the clock by which they wait.
    """

    def __init__(self, store: JobStore, storage: Storage, clock: Clock = CLOCK) -> None:
        self._store = store
        self._storage = storage
        self._clock = clock

    def _loops(self) -> NamedLoops:
        return {"queue-gauges": self._queue, "storage-gauges": self._space}

    async def _queue(self) -> None:
        while True:
            try:
                await self._measure_queue()
                metrics.store_reachable.set(1)
            except STORE_AWAY:
                metrics.store_reachable.set(0)
                for gauge in _QUEUE:
                    gauge.clear()
            await self._clock.sleep(_PERIOD_S)

    async def _measure_queue(self) -> None:
        pace = await self._store.pace()
        depth = await self._store.depth(pace.typical_work)
        paused = await self._store.paused_since() is not None
        for priority in metrics.PRIORITIES:
            one = depth.classes.get(priority)
            metrics.queued_jobs.set(one.jobs if one else 0, priority=priority)
            metrics.queued_work_tflop.set(one.work if one else 0, priority=priority)
            metrics.oldest_wait_seconds.set(one.oldest_s if one else 0, priority=priority)
        metrics.queued_work_seconds.clear()
        if (seconds := depth.seconds(pace)) is not None:
            metrics.queued_work_seconds.set(seconds)
        metrics.running_jobs.set(depth.running)
        metrics.paused.set(paused)
        canary = (await self._store.rollout()).canary
        metrics.canary_percent.set(canary.percent if canary is not None else 0)

    async def _space(self) -> None:
        while True:
            try:
                await self._storage.ping()
                metrics.storage_usable.set(1)
            except OSError:
                metrics.storage_usable.set(0)
            try:
                free = await asyncio.to_thread(self._storage.free_bytes)
            except OSError:
                metrics.free_storage_bytes.clear()
            else:
                if free is not None:
                    metrics.free_storage_bytes.set(free)
            await self._clock.sleep(_PERIOD_S)
