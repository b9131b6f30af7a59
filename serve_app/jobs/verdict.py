"""The verdict about a canary, from what became of its jobs. Pure, without a database.

Failures are judged by a sequential probability ratio test (Wald, 1945): every job that ends moves the evidence towards
"as good as the stable pipeline" or "bad", and the canary is aborted as soon as chance would hardly explain it. Evidence
for the canary is kept only up to the bound at which it counts as good, so that later trouble is seen as fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from serve_app.config import CanaryConfig

# Chances of aborting a good canary, and of calling a bad one good.
_ALPHA = _BETA = 0.05
_BAD = math.log((1 - _BETA) / _ALPHA)
_GOOD = math.log(_BETA / (1 - _ALPHA))
# A share of failures is never taken to be below this, and the stable pipeline's is measured on so many jobs.
_LEAST_RATIO = 0.01
_LEAST_STABLE_JOBS = 20


@dataclass(frozen=True)
class Evidence:
    """The facts about a canary since its trial began.

    Attributes:
        outcomes: its jobs that have ended and copies that it made, by time; True for a failure of its own.
        stable_ended: jobs that ended on the stable pipeline meanwhile.
        stable_failed: the failures of that pipeline's own among them.
        slowdowns: for each of its jobs the seconds per TFLOP, over those of similar jobs on the stable pipeline.
        different: copies that differ from their originals although the revision is the same.
        waits_s: seconds for which it has been given jobs and has begun none; None if it has.
        age_s: seconds since its trial began.
    """

    outcomes: Sequence[bool] = ()
    stable_ended: int = 0
    stable_failed: int = 0
    slowdowns: Sequence[float] = ()
    different: int = 0
    waits_s: float | None = None
    age_s: float = 0.0

    @property
    def failed(self) -> int:
        """The number of its own failures."""
        return sum(self.outcomes)

    @property
    def slowdown(self) -> float | None:
        """The median of the slowdowns; None if there are none."""
        return median(self.slowdowns) if self.slowdowns else None


@dataclass(frozen=True)
class Verdict:
    """The end of a trial, or its continuation, and the reason in a sentence."""

    action: Literal["abort", "wait", "promote"]
    reason: str


def judge(evidence: Evidence, options: CanaryConfig) -> Verdict:
    """Return the verdict on this evidence."""
    ended, failed, slowdown = len(evidence.outcomes), evidence.failed, evidence.slowdown
    if evidence.different:
        noun = "video differs" if evidence.different == 1 else "videos differ"
        return Verdict("abort", f"{evidence.different} copied {noun} from the original of the same revision.")
    if evidence.waits_s is not None and evidence.waits_s > options.start_within_s:
        return Verdict("abort", f"It began no job within {options.start_within_s:g} s of being given one.")
    score = _score(evidence, options)
    if score >= _BAD:
        stable = f"{evidence.stable_failed} of {evidence.stable_ended}"
        return Verdict("abort", f"{failed} of {ended} jobs failed by its fault; {stable} on the stable pipeline.")
    measured = len(evidence.slowdowns)
    if slowdown is not None and measured >= options.speed_jobs and slowdown > options.max_slowdown:
        return Verdict("abort", f"It takes {slowdown:.2f} times the stable pipeline's seconds, over {measured} jobs.")
    told = f"{failed} of {ended} jobs failed by its fault"
    if slowdown is not None:
        told += f", {slowdown:.2f} times the stable pipeline's seconds"
    if score > _GOOD:
        return Verdict("wait", f"Not enough jobs yet: {told}.")
    if slowdown is None or measured < options.speed_jobs:
        return Verdict("wait", f"Its speed is not known yet: {told}.")
    if evidence.age_s < options.bake_s:
        return Verdict("wait", f"Good so far, on trial for {options.bake_s - evidence.age_s:.0f} s more: {told}.")
    return Verdict("promote", f"Good: {told}.")


def _score(evidence: Evidence, options: CanaryConfig) -> float:
    """Return the logarithm of how much better "bad" explains the outcomes than "as good as stable" does."""
    enough = evidence.stable_ended >= _LEAST_STABLE_JOBS
    ratio = evidence.stable_failed / evidence.stable_ended if enough else 0.0
    bad = min(max(5 * ratio, options.failure_ratio), 0.9)
    good = min(max(ratio, _LEAST_RATIO), bad / 2)
    on_failure, on_success = math.log(bad / good), math.log((1 - bad) / (1 - good))
    score = 0.0
    for failed in evidence.outcomes:
        score = max(score + (on_failure if failed else on_success), _GOOD)
        if score >= _BAD:
            break
    return score
