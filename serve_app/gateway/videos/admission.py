"""Admission of jobs: none is accepted while it could not be written down, or its video not be stored."""

from __future__ import annotations

import asyncio
import shutil
import time

from serve_app.errors import Unavailable, one_line
from serve_app.jobs.store import JobStore
from serve_app.logs import get_logger
from serve_app.metrics import catalog as metrics
from serve_app.storage import Storage

logger = get_logger(__name__)

# Seconds for which an answer holds, and for which one is waited for.
_HOLDS_S = 2.0
_WAIT_S = 5.0
_MIB = 1 << 20


class Admission:
    """Checks of the storage and of the job store's disk, at most one every two seconds.

    Args:
        store: job store; its disk is checked if it is SQLite's.
        storage: where videos are stored.
        min_free_mib: free space that these disks must have.
    """

    def __init__(self, store: JobStore, storage: Storage, min_free_mib: float) -> None:
        self._store = store
        self._storage = storage
        self._min_free_mib = min_free_mib
        self._reason: str | None = None
        self._looked_at = float("-inf")
        self._looking: asyncio.Task[str | None] | None = None

    async def check_open(self) -> None:
        """Check that jobs can be accepted.

        Raises:
            Unavailable: they cannot; the message says why.
        """
        if time.monotonic() - self._looked_at >= _HOLDS_S:
            await self._refresh()
        if self._reason is not None:
            raise Unavailable(f"No videos are accepted at the moment: {self._reason}.")

    async def _refresh(self) -> None:
        # One check at a time, even if it hangs: each holds a thread until the storage answers.
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="admission")
        looking = self._looking
        done, _ = await asyncio.wait([looking], timeout=_WAIT_S)
        reason = looking.result() if done else f"the storage has not answered for {_WAIT_S:g} s"
        if done:
            self._looking = None
        if reason != self._reason:
            logger.warning("admission " + ("paused" if reason else "resumed"), extra={"reason": reason})
        self._reason, self._looked_at = reason, time.monotonic()
        metrics.intake_open.set(reason is None)

    async def _look(self) -> str | None:
        try:
            await self._storage.ping()
            await asyncio.to_thread(self._store_disk)
        except OSError as error:
            return str(error) or one_line(error)
        return None

    def _store_disk(self) -> None:
        folder = self._store.folder
        if folder is not None and (free_mib := shutil.disk_usage(folder).free / _MIB) < self._min_free_mib:
            raise OSError(f"the job store's disk has {free_mib:.0f} MiB free, expected {self._min_free_mib:g}")
