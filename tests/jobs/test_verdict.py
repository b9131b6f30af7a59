"""The verdict about a canary, from evidence alone."""

from __future__ import annotations

import random

import pytest

from serve_app.config import CanaryConfig
from serve_app.jobs.evidence import Timed, slowdowns
from serve_app.jobs.verdict import Evidence, judge

OPTIONS = CanaryConfig(bake_s=0)


def ended(outcomes: list[bool], **more: object) -> Evidence:
    return Evidence(outcomes, **{"stable_ended": 100, "slowdowns": [1.0] * 40, **more})  # type: ignore[arg-type]


def jobs_until_abort(ratio: float, seed: int, most: int) -> int | None:
    rng = random.Random(seed)
    outcomes: list[bool] = []
    while len(outcomes) < most:
        outcomes.append(rng.random() < ratio)
        verdict = judge(ended(outcomes), OPTIONS)
        if verdict.action == "abort":
            return len(outcomes)
        if verdict.action == "promote":
            return None
    return None


def test_nothing_is_known_at_first() -> None:
    verdict = judge(Evidence(), CanaryConfig())
    assert (verdict.action, verdict.reason) == ("wait", "Not enough jobs yet: 0 of 0 jobs failed by its fault.")


def test_a_canary_that_fails_a_third_is_aborted_within_twenty_jobs() -> None:
    found = [jobs_until_abort(1 / 3, seed, 20) for seed in range(200)]
    assert sum(jobs is None for jobs in found) <= 4
    assert judge(ended([False, True, False, True]), OPTIONS).reason == (
        "2 of 4 jobs failed by its fault; 0 of 100 on the stable pipeline."
    )


def test_a_canary_as_good_as_the_stable_pipeline_is_seldom_aborted() -> None:
    assert sum(jobs_until_abort(0.01, seed, 100) is not None for seed in range(200)) <= 10


def test_one_failure_is_no_verdict() -> None:
    assert judge(ended([True]), OPTIONS).action == "wait"


def test_failures_that_the_stable_pipeline_has_as_well_are_expected() -> None:
    outcomes = [True, False, False, False] * 3
    assert judge(ended(outcomes), OPTIONS).action == "abort"
    assert judge(ended(outcomes, stable_failed=20), OPTIONS).action != "abort"
    few = ended(outcomes, stable_ended=5, stable_failed=1)
    assert judge(few, OPTIONS).action == "abort"


def test_success_of_long_ago_does_not_hide_new_trouble() -> None:
    assert judge(ended([False] * 1000 + [True, True, True]), OPTIONS).action == "abort"


@pytest.mark.parametrize(("slowdown", "jobs", "action"), [(3.0, 8, "abort"), (3.0, 7, "wait"), (1.2, 8, "wait")])
def test_a_slow_canary_is_aborted(slowdown: float, jobs: int, action: str) -> None:
    assert judge(ended([False] * jobs, slowdowns=[slowdown] * jobs), OPTIONS).action == action


def test_a_canary_that_never_starts_is_aborted() -> None:
    assert judge(Evidence(waits_s=599), CanaryConfig()).action == "wait"
    assert judge(Evidence(waits_s=601), CanaryConfig()).reason == "It began no job within 600 s of being given one."


def test_one_copy_with_other_bits_is_enough() -> None:
    assert judge(ended([False] * 100, different=1), OPTIONS).reason == (
        "1 copied video differs from the original of the same revision."
    )


def test_a_good_canary_has_to_be_on_trial_for_a_while() -> None:
    good = ended([False] * 40, age_s=10)
    assert judge(good, OPTIONS).action == "promote"
    waits = judge(good, CanaryConfig(bake_s=60))
    assert (waits.action, "50 s more" in waits.reason) == ("wait", True)
    unknown = judge(ended([False] * 40, slowdowns=[]), OPTIONS)
    assert (unknown.action, "speed" in unknown.reason) == ("wait", True)


def test_jobs_are_compared_with_those_of_similar_work() -> None:
    # A job has 10 seconds that do not grow with its work: small jobs take more seconds for each TFLOP everywhere.
    small, large = Timed(1, 11), Timed(100, 110)
    theirs = [small] * 5 + [large] * 5
    assert slowdowns([small, large], theirs) == pytest.approx([1.0, 1.0])
    assert slowdowns([Timed(1, 33)], theirs) == pytest.approx([3.0])
    assert slowdowns([Timed(10, 20)], theirs) == []
