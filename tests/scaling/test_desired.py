"""How many replicas a backlog wants."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.jobs.backlog import Backlog
from serve_app.scaling.desired import desired_groups, desired_of_stage
from serve_app.scaling.watcher import fitting

# The policy aims at a tenth of these.
TARGETS = {"interactive": 100.0, "standard": 1000.0, "batch": 10_000.0}
# One group does 10 TFLOP/s.
SHARES = {"encoder": 0.05, "decoder": 0.6}


def backlog(jobs: int = 1000, denoising: int = 0, rate: float | None = 10.0, **work: float) -> Backlog:
    """Return a backlog of so many equal jobs; a thousand of them are so small that their own time does not count."""
    total = sum(work.values()) or 1.0
    return Backlog(work, {name: math.ceil(jobs * some / total) for name, some in work.items()}, denoising, rate, SHARES)


@pytest.mark.parametrize(
    "found, expected",
    [
        (Backlog(), 0),
        (backlog(standard=1000), 1),
        (backlog(standard=1010), 2),
        (backlog(interactive=300), 3),
        (backlog(batch=15_000), 2),
        (backlog(interactive=50, standard=3950), 4),  # standard jobs wait for interactive ones too
        (backlog(standard=2000, batch=19_000), 3),  # the tightest decides
        (backlog(standard=1, denoising=9), 3),  # a group holds four
        (backlog(1, interactive=5000), 1),  # one job is not done sooner by more groups
        (backlog(4, interactive=20_000), 4),  # 2000 s in 10 s, but there are no more jobs
        (backlog(4, standard=4000), 2),  # the last one begins after 100 s
        (backlog(rate=None, standard=5), None),
    ],
)
def test_groups(found: Backlog, expected: int | None) -> None:
    assert desired_groups(found, TARGETS, places=4) == expected


def test_the_speed_of_a_group_does_not_depend_on_their_number() -> None:
    """Else the number would feed itself."""
    assert desired_groups(backlog(standard=8000), TARGETS, 4) == 8
    assert desired_groups(backlog(standard=8000, denoising=8), TARGETS, 4) == 8


def test_split_experts_share_the_steps() -> None:
    found = backlog(standard=10_000)
    assert [desired_groups(found, TARGETS, 4, share) for share in (0.65, 0.35)] == [7, 4]


def test_stages_follow() -> None:
    found = backlog(standard=10_000)
    assert [desired_of_stage(found, 10, stage) for stage in ("encoder", "decoder")] == [1, 6]
    assert desired_of_stage(Backlog(), 10, "decoder") == 0
    assert desired_of_stage(Backlog({"standard": 1}, {"standard": 1}), 10, "decoder") is None


@given(st.fixed_dictionaries({name: st.floats(1, 1e6) for name in TARGETS}), st.integers(1, 99), st.floats(0.1, 1e3))
def test_more_work_never_wants_fewer_and_no_more_than_jobs(work: dict[str, float], jobs: int, rate: float) -> None:
    counts = dict.fromkeys(TARGETS, jobs)
    less = desired_groups(Backlog(work, counts, 0, rate), TARGETS, 4)
    more = desired_groups(Backlog({name: 2 * amount for name, amount in work.items()}, counts, 0, rate), TARGETS, 4)
    assert less is not None and more is not None and 1 <= less <= more <= 3 * jobs


def test_what_fits() -> None:
    hosts = [{"CPU": 8, "GPU": 3}, {"CPU": 1, "GPU": 8}, {"CPU": 8}]
    group = [{"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
    assert fitting(hosts, group, one_host=True) == 1
    assert fitting([{"CPU": 2, "GPU": 1}, {"CPU": 1, "GPU": 1}], group, one_host=True) == 0
    assert fitting([{"CPU": 2, "GPU": 1}, {"CPU": 1, "GPU": 1}], group, one_host=False) == 1
    assert fitting(hosts, [{"CPU": 0}], one_host=True) > 1000
