"""Removes what nobody will ask for: jobs whose time is up, and the files of those and of runs that came to nothing.

Beside the dispatcher's loop, not in it: a storage that is slow or hangs must not keep leases from being renewed.
"""

from __future__ import annotations

import asyncio

from serve_app.clock import CLOCK, Clock
from serve_app.db.database import STORE_AWAY
from serve_app.errors import one_line
from serve_app.jobs.store import JobStore
from serve_app.logs import get_logger
from serve_app.storage import Storage

logger = get_logger(__name__)

# How often at least.
_PAUSE_S = 5.0


class Janitor:
    """Works until stopped, some rows and folders at a time. Any number of them share one store.

    Args:
        pause_s: between two rounds.
    """

    def __init__(self, store: JobStore, storage: Storage, pause_s: float, clock: Clock = CLOCK) -> None:
        self._store = store
        self._storage = storage
        self._pause_s = min(pause_s, _PAUSE_S)
        self._clock = clock
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, as a task of the running event loop."""
        self.task = asyncio.create_task(self._loop(), name="janitor")

    async def stop(self) -> None:
        """End, wherever it is: what is not struck off is removed again."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task], timeout=5)

    async def _loop(self) -> None:
        while True:
            try:
                if expired := await self._store.expire():
                    logger.info("expired", extra={"jobs": expired})
                await self._remove()
            except STORE_AWAY as error:
                logger.warning("nothing removed", extra={"error": one_line(error)})
            await self._clock.sleep(self._pause_s)

    async def _remove(self) -> None:
        """Remove the folders that are due. Their rows stay until they are gone, so what fails is tried again."""
        items = await self._store.garbage()
        for item in items:
            if removed := await self._storage.delete_prefix(item.prefix):
                logger.info("outputs removed", extra={"prefix": item.prefix, "objects": removed})
        if items:
            await self._store.forget_garbage(items)
