"""The gate of a dispatcher: whether its generation may lease jobs, and how long its running ones may go on if not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from serve_app.clock import CLOCK, Clock
from serve_app.jobs.store import JobStore
from serve_app.logs import get_logger

logger = get_logger(__name__)

# Seconds between two signs that a generation gives of itself once it is current.
_SIGN_S = 5.0

Ready = Callable[[], Awaitable[bool]]
"""Returns whether the pipeline of this generation runs."""


async def always_ready() -> bool:
    """Say that the pipeline runs."""
    return True


class Gate:
    """The place of one dispatcher's generation among those of its store.

    Args:
        store: a started job store.
        name: the generation; empty for a dispatcher that always leases.
        drain_s: seconds for which jobs go on after the generation was retired.
        ready: says whether its pipeline runs; asked while it is not current.
        clock: the clock by which it counts.
    """

    def __init__(
        self, store: JobStore, name: str, drain_s: float, ready: Ready = always_ready, clock: Clock = CLOCK
    ) -> None:
        self.name = name
        self.open = not name
        """True if this generation is the current one, as far as is known."""
        self._store = store
        self._drain_s = drain_s
        self._ready = ready
        self._clock = clock
        self._sign_at = float("-inf")
        self._closed_at: float | None = None

    async def look(self) -> None:
        """Learn from the store whether this generation is the current one. Raises while the store is away."""
        if not self.name:
            return
        fresh = self._clock.monotonic() - self._sign_at < _SIGN_S
        if self.open and fresh and await self._store.is_current(self.name):
            return
        ready = self.open or await self._ready()
        was, self.open = self.open, await self._store.report_generation(self.name, ready)
        self._sign_at = self._clock.monotonic()
        if self.open:
            self._closed_at = None
        elif was:
            self._closed_at = self._clock.monotonic()
        if was != self.open:
            logger.info("leases jobs" if self.open else "leases no more jobs", extra={"generation": self.name})

    @property
    def drained(self) -> bool:
        """Return whether running jobs have had their time since this generation was retired."""
        return self._closed_at is not None and self._clock.monotonic() - self._closed_at >= self._drain_s
