"""Owners and their pipelines."""

from __future__ import annotations

from serve_app.jobs.assignment import share

OWNERS = [f"{number:016x}" for number in range(2000)]


def test_a_larger_share_only_adds_owners() -> None:
    before: set[str] = set()
    for percent in (0, 1, 5, 10, 25, 50, 100):
        chosen = {owner for owner in OWNERS if share("next", owner) < percent}
        assert before <= chosen
        assert abs(len(chosen) / len(OWNERS) * 100 - percent) < 3
        before = chosen
    assert len(before) == len(OWNERS)


def test_each_canary_has_other_owners_first() -> None:
    first, second = ({o for o in OWNERS if share(name, o) < 10} for name in ("next", "other"))
    assert len(first & second) < 0.4 * len(first)
