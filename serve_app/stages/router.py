"""The way of a sample to a group: the one with the fewest samples, of all of them.

Serve's own router looks at two groups at random. For calls that take minutes that is too few: a sample then waits in a
group while another one is idle. Asking every group costs a message to each, once for a video.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class EmptiestGroup(FIFOMixin, RequestRouter):
    """A router that has Serve compare the queues of all replicas. Among equal ones, chance decides."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Take no options."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return all replicas as one rank: of a rank, Serve takes the one with the shortest queue that accepts."""
        return [random.sample(candidate_replicas, len(candidate_replicas))] if candidate_replicas else []
