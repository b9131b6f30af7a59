"""The number of replicas that a backlog wants. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from serve_app.config import Priority
from serve_app.jobs.backlog import Backlog

# Share of its target that the wait of a class should have as far as can be seen: jobs come in clusters, and a group
# takes minutes to start. As groups are busy either way, less costs hardly more GPU-hours. Simulated with 32 groups for
# twelve hours: at 1, 27 % of the jobs are late for 405 GPU-hours, at 0.1 less than 3 % for 419.
_AIM = 0.1
# A count this little above a whole number is that number: sums of floating-point work are not exact.
_ROUNDING = 1e-6


def desired_groups(backlog: Backlog, target_wait_s: Mapping[str, float], places: int, share: float = 1.0) -> int | None:
    """Return how many groups begin the jobs of every class well within its target; None if their speed is not known.

    A class waits for its own work and that of all more urgent ones, and the tightest class decides. The last job's own
    seconds are no wait, and no number of groups makes them fewer: so `seconds / (wait + own seconds)` groups are
    enough, which is never more than there are jobs. Groups that hold samples are never too many.

    Args:
        backlog: the work.
        target_wait_s: seconds within which the jobs of a class should begin.
        places: samples that a group can hold.
        share: the part of each job's work that these groups do, if experts are split.
    """
    if not backlog.jobs:
        return 0
    wanted = 0.0
    for priority in get_args(Priority):
        found = backlog.seconds_up_to(priority)
        if found is None:
            return None
        if backlog.work.get(priority):
            seconds, own_s = found
            wanted = max(wanted, seconds * share / (_AIM * target_wait_s[priority] + own_s * share))
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
