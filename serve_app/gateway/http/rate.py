"""Limits of requests per minute, counted in this process."""

from __future__ import annotations

import time
from collections.abc import Callable

# Buckets that are remembered. The key that called longest ago is forgotten first, and starts with a full bucket.
_KEYS = 10_000


class Buckets:
    """A token bucket for each key, which fills up within a minute.

    Args:
        replicas: number of processes among which the requests are spread.
        clock: returns the time in seconds.
    """

    def __init__(self, replicas: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._replicas = replicas
        self._clock = clock
        self._tokens: dict[str, tuple[float, float]] = {}
        """The tokens that each key had left at its last request, and the time of that request."""

    def take_token(self, key: str, per_minute: int) -> float:
        """Take a token if there is one, and return 0; otherwise return the seconds until there is one."""
        share = per_minute / self._replicas
        # The bucket holds at least one token, or a key with a low limit would never get a request through.
        full = max(share, 1.0)
        now = self._clock()
        left, at = self._tokens.pop(key, (full, now))
        left = min(left + (now - at) * share / 60, full)
        # The tolerance is for rounding.
        wait_s = 0.0 if left >= 1 - 1e-9 else (1 - left) * 60 / share
        self._tokens[key] = (left if wait_s else max(left - 1, 0.0), now)
        if len(self._tokens) > _KEYS:
            del self._tokens[next(iter(self._tokens))]
        return wait_s
