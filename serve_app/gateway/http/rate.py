"""Requests a minute, counted in this process."""

from __future__ import annotations

import time
from collections.abc import Callable

# More keys than this are not remembered: who was not seen for longest starts with a full bucket.
_KEYS = 10_000


class Buckets:
    """A token bucket for each key, which fills up within a minute.

    Args:
        replicas: processes among which the requests are spread.
        clock: in seconds.
    """

    def __init__(self, replicas: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._replicas = replicas
        self._clock = clock
        self._tokens: dict[str, tuple[float, float]] = {}
        """The tokens that a key had left, and when."""

    def take(self, key: str, per_minute: int) -> float:
        """0 if a request may pass now, else the seconds until one may."""
        share = per_minute / self._replicas
        # At least one, else a key with few requests would never get any through.
        full = max(share, 1.0)
        now = self._clock()
        left, at = self._tokens.pop(key, (full, now))
        left = min(left + (now - at) * share / 60, full)
        # A token that is there but for rounding is there.
        wait_s = 0.0 if left >= 1 - 1e-9 else (1 - left) * 60 / share
        self._tokens[key] = (left if wait_s else max(left - 1, 0.0), now)
        if len(self._tokens) > _KEYS:
            del self._tokens[next(iter(self._tokens))]
        return wait_s
