"""The order of the queue in Python: `serve_app.jobs.order`, for forecasts and the simulator.

A property test holds both equal. Pure, without a database. Times are seconds since the epoch.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Waiting:
    """A job that waits, as far as its place in the queue depends on it. The fields are those of `Job`."""

    id: str
    owner: str
    effective_deadline: float
    not_before: float = 0.0
    deadline_at: float | None = None
    content: Any = None
    """Anything that comes back with it."""


class ClaimOrder:
    """The jobs that wait, and which one begins next.

    Args:
        limits: most running jobs of an owner, for those who have such a limit.
        running: running jobs of each owner.
        served_at: the latest start of a job of each owner.
    """

    def __init__(
        self,
        limits: Mapping[str, int] | None = None,
        running: Mapping[str, int] | None = None,
        served_at: Mapping[str, float] | None = None,
    ) -> None:
        self._limits = dict(limits or {})
        self._running = Counter(running or {})
        self._served_at = dict(served_at or {})
        self._due: dict[str, list[tuple[float, str, Waiting]]] = {}
        self._later: list[tuple[float, str, Waiting]] = []
        self._count = 0

    def __len__(self) -> int:
        """Return how many jobs wait."""
        return self._count

    def add(self, job: Waiting) -> None:
        """Add a job."""
        self._count += 1
        heapq.heappush(self._later, (job.not_before, job.id, job))

    def begin_next(self, now: float) -> Waiting | None:
        """Take out the job that begins next, and count it as running from now on; None if no job may begin.

        Jobs whose deadline has passed are dropped.
        """
        while self._later and self._later[0][0] <= now:
            job = heapq.heappop(self._later)[2]
            heapq.heappush(self._due.setdefault(job.owner, []), (job.effective_deadline, job.id, job))
        heads = []
        for owner in list(self._due):
            head = self._head(owner, now)
            if head is not None and not self._at_limit(owner):
                effective = head.effective_deadline
                key = (self._running[owner], max(effective, now), self._served_at.get(owner, 0.0), effective)
                heads.append((key, owner))
        if not heads:
            return None
        owner = min(heads)[1]
        job = heapq.heappop(self._due[owner])[2]
        self._count -= 1
        self._running[owner] += 1
        self._served_at[owner] = now
        return job

    def ended(self, owner: str) -> None:
        """Note that a running job of an owner has ended."""
        self._running[owner] -= 1

    def _at_limit(self, owner: str) -> bool:
        limit, running = self._limits.get(owner), self._running[owner]
        return limit is not None and running > 0 and running >= limit

    def _head(self, owner: str, now: float) -> Waiting | None:
        jobs = self._due[owner]
        while jobs:
            job = jobs[0][2]
            if job.deadline_at is None or job.deadline_at > now:
                return job
            heapq.heappop(jobs)
            self._count -= 1
        del self._due[owner]
        return None
