"""A sample inside the engine: what its listener has yet to hear, and how long its steps take."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from serve_app.engine.sample_request import Denoised, Moved, SampleRequest
from serve_app.engine.scheduler import Entry
from serve_app.events import Progress

# Weight of the newest step in the running mean of step times: follows batch mates that come and go.
_NEWEST = 0.3


@dataclass
class Flight:
    """A sample from its admission until its listener leaves.

    Attributes:
        request: what was asked for.
        entry: what the scheduler knows of it.
        events: what its listener has yet to hear.
        admitted: when it came, on the monotonic clock.
        first_step: the step that it came with.
        unsaved_s: seconds of denoising that would be lost with the group.
        saved_step: the latest step whose state was saved here; 0 if none was.
        group_s: the sample's share of the seconds of its passes, by its share of the work in each.
        passes: the sum of these shares: 1 for a pass of its own, a quarter for one of four equal samples.
    """

    request: SampleRequest
    entry: Entry
    events: asyncio.Queue[Progress | Denoised | Moved | Exception] = field(default_factory=asyncio.Queue)
    admitted: float = field(default_factory=time.monotonic)
    first_step: int = 0
    unsaved_s: float = 0.0
    saved_step: int = 0
    group_s: float = 0.0
    passes: float = 0.0
    _step_s: float | None = None
    _last_step: float = field(default_factory=time.monotonic)

    def advance(self, seconds: float, saved: bool, passed_s: float, share: float) -> None:
        """Tell the listener of a step that was made.

        Args:
            seconds: how long it took on the ranks.
            saved: whether the state after it is being saved.
            passed_s: seconds until the ranks had answered.
            share: the sample's share of the work in it.
        """
        now = time.monotonic()
        took, self._last_step = now - self._last_step, now
        self._step_s = took if self._step_s is None else self._step_s + _NEWEST * (took - self._step_s)
        self.unsaved_s = 0.0 if saved else self.unsaved_s + seconds
        self.group_s += passed_s * share
        self.passes += share
        if saved:
            self.saved_step = self.entry.step
        left = self._step_s * (self.entry.steps - self.entry.step)
        self.events.put_nowait(Progress("denoise", self.entry.step, self.entry.steps, left, self.saved_step))

    @property
    def seconds(self) -> float:
        """Seconds since the sample came."""
        return time.monotonic() - self.admitted
