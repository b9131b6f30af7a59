"""The time that passes on this host, and waiting for it: in one place, so that a test can put it forward.

Deadlines and leases of jobs are judged by the database's clock instead (`serve_app.db.database.Database.clock`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None:
        """Do not make the call. Without effect once it was made."""


class Clock:
    """The monotonic clock of this host. Times and durations are in seconds."""

    def monotonic(self) -> float:
        """Return the time since an arbitrary moment."""
        return time.monotonic()

    def call_later(self, delay_s: float, call: Callable[[], object]) -> Timer:
        """Have the running event loop call something once, after a delay."""
        return asyncio.get_running_loop().call_later(delay_s, call)

    async def sleep(self, delay_s: float) -> None:
        """Wait for a while."""
        await self.wait(asyncio.Event(), delay_s)

    async def wait(self, event: asyncio.Event, within_s: float) -> None:
        """Wait until an event is set, but no longer than `within_s`."""
        waiting = asyncio.ensure_future(event.wait())
        timer = self.call_later(within_s, waiting.cancel)
        try:
            await asyncio.wait([waiting])
        finally:
            timer.cancel()
            waiting.cancel()


CLOCK = Clock()
