"""The number of replicas that a backlog wants. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from serve_app.config import Priority
from serve_app.jobs.backlog import Backlog

# A count this little above a whole number is that number: sums of floating-point work are not exact.
_ROUNDING = 1e-6


def desired_groups(backlog: Backlog, target_wait_s: Mapping[str, float], places: int, share: float = 1.0) -> int | None:
    """Return how many groups do the work of every class within its target; None if their speed is not known.

    A class waits for its own work and that of all more urgent ones, so each sum has to be done within the target of its
    last class, and the tightest of these decides. Groups that hold samples are never too many.

    Args:
        backlog: the work.
        target_wait_s: seconds within which the work of a class should be done.
        places: samples that a group can hold.
        share: the part of each job's work that these groups do, if experts are split.
    """
    if not backlog.jobs:
        return 0
    rate = backlog.work_per_group_s
    if not rate:
        return None
    wanted, ahead = 0.0, 0.0
    for priority in get_args(Priority):
        if work := backlog.work.get(priority, 0.0):
            ahead += work * share
            wanted = max(wanted, ahead / (rate * target_wait_s[priority]))
    busy = backlog.denoising / places
    return max(_ceil(wanted), _ceil(busy), 1)


def desired_of_stage(backlog: Backlog, groups: int, stage: str) -> int | None:
    """Return how many encoders or decoders keep pace with so many groups; None if their speed is not known.

    Args:
        backlog: the work.
        groups: number of groups that work.
        stage: `encoder` or `decoder`.
    """
    if not backlog.jobs:
        return 0
    share = backlog.shares.get(stage)
    return None if share is None else max(_ceil(groups * share), 1)


def _ceil(number: float) -> int:
    return math.ceil(number - _ROUNDING)
