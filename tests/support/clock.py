"""A clock that runs as usual and can be put forward by hand, so that no test waits for a lease to run out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from serve_app.clock import Clock
from serve_app.db.database import Database
from serve_app.jobs.store import JobStore


class _Timer:
    """A call at a time of a `MovableClock`."""

    def __init__(self, at: float, call: Callable[[], object]) -> None:
        self.at = at
        self.over = False
        self._call = call
        self._handle: asyncio.TimerHandle | None = None

    def start(self, now: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = asyncio.get_running_loop().call_later(max(self.at - now, 0), self._fire)

    def cancel(self) -> None:
        self.over = True
        if self._handle is not None:
            self._handle.cancel()

    def _fire(self) -> None:
        self.over = True
        self._call()


class MovableClock(Clock):
    """The host's clock, and that of databases which follow it, ahead by what a test says."""

    def __init__(self) -> None:
        self._ahead_s = 0.0
        self._timers: list[_Timer] = []

    def monotonic(self) -> float:
        return super().monotonic() + self._ahead_s

    def call_later(self, delay_s: float, call: Callable[[], object]) -> _Timer:
        timer = _Timer(self.monotonic() + delay_s, call)
        timer.start(self.monotonic())
        self._timers = [*(timer for timer in self._timers if not timer.over), timer]
        return timer

    def advance(self, seconds: float) -> None:
        """Let this much time pass at once: what is due by then is called next."""
        self._ahead_s += seconds
        for timer in self._timers:
            if not timer.over:
                timer.start(self.monotonic())

    def lead(self, database: Database) -> None:
        """Have a database's clock advance with this one."""
        now = database.now
        database.now = lambda: now() + self._ahead_s  # type: ignore[method-assign]


@pytest.fixture
def clock(store: JobStore) -> MovableClock:
    """The clock of the store's database, and of the dispatchers that a test starts."""
    clock = MovableClock()
    clock.lead(store.database)
    return clock
