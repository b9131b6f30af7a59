"""The policy by which Serve's controller scales a stage: by the work that waits in the durable queue.

It runs on the controller's event loop, in which a call that blocks stops health checks, and one that raises stops the
deploys of every application. So it only looks at figures that a thread has read, and catches everything. Serve pickles
this module by value, so it imports what it needs where it needs it.
"""

from __future__ import annotations

from typing import Any


class WorkPolicy:
    """An autoscaling policy of one deployment.

    Args:
        store_url: SQLAlchemy URL of the job store.
        stage: `denoiser`, `encoder` or `decoder`.
        target_wait_s: seconds within which the jobs of each class should begin.
        places: samples that a group can hold.
        bundles: resources of each process of a replica.
        one_host: whether these have to be on one host.
        bounded: whether a replica is only asked for if its resources are free.
        share: the part of each job's work that the groups of this deployment do.
        most_groups: largest number of groups, for stages that follow them.
        poll_s: seconds between two looks at the store.
    """

    def __init__(
        self,
        store_url: str,
        stage: str,
        target_wait_s: dict[str, float],
        places: int = 1,
        bundles: list[dict[str, float]] | None = None,
        one_host: bool = True,
        bounded: bool = True,
        share: float = 1.0,
        most_groups: int = 1,
        poll_s: float = 5.0,
    ) -> None:
        self._store_url = store_url
        self._stage = stage
        self._target_wait_s = target_wait_s
        self._places = places
        self._bundles = bundles or []
        self._one_host = one_host
        self._bounded = bounded
        self._share = share
        self._most_groups = most_groups
        self._poll_s = poll_s
        self._watcher: Any = None
        self._told = False

    def __call__(self, ctx: Any) -> tuple[int | float, dict[str, Any]]:
        """Return the number of replicas, and no state; the present target when in doubt."""
        try:
            return self._desired(ctx), {}
        except Exception as error:
            if not self._told:  # ten times a second the same line would fill the disk
                self._told = True
                _tell(error)
            return ctx.target_num_replicas, {}

    def _desired(self, ctx: Any) -> int:
        from serve_app.compat.ray import free_resources
        from serve_app.scaling.desired import desired_groups, desired_of_stage
        from serve_app.scaling.watcher import watcher

        target = int(ctx.target_num_replicas)
        if self._watcher is None:
            self._watcher = watcher(self._store_url, self._poll_s, free_resources)
        backlog = self._watcher.backlog
        if backlog is None:  # not read yet, or the store is away
            return target
        desired = desired_groups(backlog, self._target_wait_s, self._places, self._share)
        if desired is not None and self._stage != "denoiser":
            desired = desired_of_stage(backlog, min(desired, self._most_groups), self._stage)
        if desired is None:  # nobody knows how fast a group is: one finds out
            return max(target, 1)
        if self._bounded and desired > target:
            fit = self._watcher.fitting(self._bundles, self._one_host)
            if fit is not None:
                desired = min(desired, max(target, int(ctx.current_num_replicas) + fit))
        return desired


def _tell(error: Exception) -> None:
    from serve_app.errors import one_line
    from serve_app.logs import get_logger

    get_logger("serve_app.scaling").error("autoscaling by work holds still", extra={"error": one_line(error)})
