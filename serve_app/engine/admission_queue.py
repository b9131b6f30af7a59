"""Places for a bounded number of samples, given to the most urgent of those that wait."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from serve_app.engine.errors import NotAdmitting
from serve_app.errors import JobFailed
from serve_app.metrics import catalog as metrics


@dataclass(frozen=True)
class Candidate:
    """A sample that asks for a place.

    Attributes:
        id: the sample's.
        priority: of its class; 0 is the most urgent.
        effective_deadline: as in `Entry`.
    """

    id: str
    priority: int
    effective_deadline: float

    def key(self, now: float) -> tuple[float, float, float]:
        """Return a key to sort by; the smallest goes first."""
        return (
            (0, 0, self.effective_deadline)
            if self.effective_deadline <= now
            else (1, self.priority, self.effective_deadline)
        )


class AdmissionQueue:
    """The places of an engine, and the samples that wait for one.

    Args:
        places: how many samples may be inside at once.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._closed = False
        self._inside: set[str] = set()
        self._waiting: dict[str, tuple[Candidate, asyncio.Future[None]]] = {}

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._inside

    @property
    def waiting(self) -> int:
        """Number of samples that wait for a place."""
        return len(self._waiting)

    def next_candidate(self) -> Candidate | None:
        """Return the candidate that would get the next place; None if no sample waits."""
        now = time.time()
        waiting = (candidate for candidate, _ in self._waiting.values())
        return min(waiting, key=lambda candidate: candidate.key(now), default=None)

    async def wait_for_place(self, candidate: Candidate) -> None:
        """Take a place as soon as there is one.

        Raises:
            JobFailed: the sample has a place, or waits for one, already.
            NotAdmitting: `close` was called.
        """
        if self._closed:
            raise NotAdmitting("this group takes no more samples")
        if candidate.id in self._inside or candidate.id in self._waiting:
            raise JobFailed("duplicate", f"sample {candidate.id} is being denoised already")
        if self._free:
            self._free -= 1
            self._inside.add(candidate.id)
            self._measure()
            return
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[candidate.id] = candidate, given
        self._measure()
        try:
            await given
        except asyncio.CancelledError:
            self._waiting.pop(candidate.id, None)
            self._measure()
            if candidate.id in self._inside:  # the place was given in the very moment in which the wait was cancelled
                self.free_place(candidate.id)
            raise

    def free_place(self, sample_id: str) -> None:
        """Give a sample's place to the next one."""
        self._inside.remove(sample_id)
        candidate = self.next_candidate()
        if candidate is None:
            self._free += 1
        else:
            self._inside.add(candidate.id)
            self._waiting.pop(candidate.id)[1].set_result(None)
        self._measure()

    def close(self) -> None:
        """Give no more places, and send away the samples that wait."""
        self._closed = True
        for _, given in self._waiting.values():
            if not given.done():
                given.set_exception(NotAdmitting("this group takes no more samples"))
        self._waiting.clear()
        self._measure()

    def open(self) -> None:
        """Give places again."""
        self._closed = False

    def _measure(self) -> None:
        metrics.resident_samples.set(len(self._inside))
        metrics.waiting_samples.set(len(self._waiting))
