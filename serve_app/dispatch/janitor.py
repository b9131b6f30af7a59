"""The janitor, which removes expired jobs, their files, and the files of runs that were superseded or cut off.

It runs beside the dispatcher's loop rather than in it: a storage that hangs must not keep leases from being renewed.
"""

from __future__ import annotations

from serve_app.clock import CLOCK, Clock
from serve_app.db.database import STORE_AWAY
from serve_app.dispatch.loops import Loops, NamedLoops
from serve_app.errors import one_line
from serve_app.jobs.store import JobStore
from serve_app.logs import get_logger
from serve_app.storage import Storage

logger = get_logger(__name__)

# Most seconds between two rounds.
_LONGEST_PAUSE_S = 5.0


class Janitor(Loops):
    """A loop that removes some rows and folders at a time until stopped. Any number of janitors share one store.

    Args:
        store: a started job store.
        storage: the storage of the jobs' files.
        pause_s: seconds between two rounds.
        clock: the clock by which it waits.
    """

    def __init__(self, store: JobStore, storage: Storage, pause_s: float, clock: Clock = CLOCK) -> None:
        self._store = store
        self._storage = storage
        self._pause_s = min(pause_s, _LONGEST_PAUSE_S)
        self._clock = clock

    def _loops(self) -> NamedLoops:
        return {"janitor": self._loop}

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
        """Remove the folders that are due. A row stays until its folder is gone, so that a failure is tried again."""
        items = await self._store.garbage()
        for item in items:
            if removed := await self._storage.delete_prefix(item.prefix):
                logger.info("outputs removed", extra={"prefix": item.prefix, "objects": removed})
        if items:
            await self._store.forget_garbage(items)
