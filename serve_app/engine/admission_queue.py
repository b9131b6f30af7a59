"""Room for a bounded number of samples, given to whoever is most urgent."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from serve_app.errors import JobFailed, ServeAppError


class Leaving(ServeAppError):
    """No seat is given any more: the engine's samples move elsewhere."""


@dataclass(frozen=True)
class Claim:
    """Who asks for room, and the class (0 is the most urgent) and turn that decide, as in `Entry`."""

    id: str
    priority: int
    effective_deadline: float

    def key(self, now: float) -> tuple[float, float, float]:
        """The smaller, the sooner."""
        return (
            (0, 0, self.effective_deadline)
            if self.effective_deadline <= now
            else (1, self.priority, self.effective_deadline)
        )


class AdmissionQueue:
    """Seats in an engine.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._closed = False
        self._taken: set[str] = set()
        self._waiting: dict[str, tuple[Claim, asyncio.Future[None]]] = {}

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._taken

    def next(self) -> Claim | None:
        """Who would get the next seat."""
        now = time.time()
        return min((claim for claim, _ in self._waiting.values()), key=lambda claim: claim.key(now), default=None)

    async def take(self, claim: Claim) -> None:
        """Wait for a seat.

        Raises:
            JobFailed: the sample has a seat, or waits for one, already.
            Leaving: `close` was called.
        """
        if self._closed:
            raise Leaving("this group takes no more samples")
        if claim.id in self._taken or claim.id in self._waiting:
            raise JobFailed("duplicate", f"sample {claim.id} is being denoised already")
        if self._free:
            self._free -= 1
            self._taken.add(claim.id)
            return
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[claim.id] = claim, given
        try:
            await given
        except asyncio.CancelledError:
            self._waiting.pop(claim.id, None)
            if claim.id in self._taken:  # it was given in the very moment that nobody wanted it any more
                self.leave(claim.id)
            raise

    def leave(self, sample_id: str) -> None:
        """Free a seat."""
        self._taken.remove(sample_id)
        self._hand_on()

    def close(self) -> None:
        """Give no more seats; who waits for one hears it."""
        self._closed = True
        for _, given in self._waiting.values():
            if not given.done():
                given.set_exception(Leaving("this group takes no more samples"))
        self._waiting.clear()

    def open(self) -> None:
        """Give seats again."""
        self._closed = False

    def _hand_on(self) -> None:
        claim = self.next()
        if claim is None:
            self._free += 1
        else:
            self._taken.add(claim.id)
            self._waiting.pop(claim.id)[1].set_result(None)
