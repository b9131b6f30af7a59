"""Autoscaling of simulated groups: the decision of the real policy, and Serve's delays around it."""

from __future__ import annotations

import math

from serve_app.config import Autoscaling
from serve_app.jobs.backlog import Backlog
from serve_app.scaling.desired import desired_groups


class Scaler:
    """Serve's autoscaler for one deployment.

    Args:
        options: how it is scaled.
        places: samples that a group can hold.
    """

    def __init__(self, options: Autoscaling, places: int) -> None:
        self._options = options
        self._places = places
        self._up_since: float | None = None
        self._down_since: float | None = None

    def target(self, backlog: Backlog, ongoing: int, target: int, now: float) -> int:
        """Return the number of groups that should be there from now on.

        Args:
            backlog: the work.
            ongoing: jobs that the dispatchers drive, which is what Serve sees.
            target: number of groups that should be there so far.
            now: the time.
        """
        options = self._options
        if options.by == "work":
            wanted = desired_groups(backlog, options.target_wait_s.model_dump(), self._places)
            desired = max(target, 1) if wanted is None else wanted
        else:
            desired = math.ceil(ongoing / options.target_queue_length)
        desired = min(max(desired, options.min_replicas), options.max_replicas)
        self._up_since = (now if self._up_since is None else self._up_since) if desired > target else None
        self._down_since = (now if self._down_since is None else self._down_since) if desired < target else None
        if self._up_since is not None and now - self._up_since >= options.upscale_delay_s:
            self._up_since = None
            return desired
        if self._down_since is not None and now - self._down_since >= options.downscale_delay_s:
            self._down_since = None
            return desired
        return target
