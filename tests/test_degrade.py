"""What is made at which level of load, and how the level moves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.degrade import MAX_LEVEL, Amount, Floor, Level, reduced, steer
from serve_app.errors import InvalidRequest
from serve_app.parameters import Priority

SIDES = st.integers(1, 90).map(lambda side: 16 * side)
AMOUNTS = st.builds(Amount, SIDES, SIDES, st.integers(1, 100))
FLOORS = st.builds(
    lambda size, steps: Floor(size and size[0], size and size[1], steps),
    st.none() | st.tuples(SIDES, SIDES),
    st.none() | st.integers(1, 100),
)
LEVELS = st.integers(0, MAX_LEVEL)
CLASSES = st.sampled_from(get_args(Priority))
ASKED = Amount(1280, 720, 40)
FLOOR = Floor(832, 480, 20)


@given(AMOUNTS, LEVELS, CLASSES)
def test_who_says_nothing_gets_exactly_what_they_asked_for(asked: Amount, level: int, priority: Priority) -> None:
    assert reduced(asked, None, level, priority) == asked


@given(AMOUNTS, FLOORS, LEVELS, CLASSES)
def test_never_more_and_never_below_the_floor(asked: Amount, floor: Floor, level: int, priority: Priority) -> None:
    made = reduced(asked, floor, level, priority)
    assert made.width <= max(asked.width, asked.height) and made.steps <= asked.steps
    assert made.width * made.height <= asked.width * asked.height
    least = (floor.width or 10**6) * (floor.height or 10**6)
    assert made.width * made.height >= min(least, asked.width * asked.height)
    assert made.steps >= min(floor.steps or 10**6, asked.steps)
    assert made.width % 16 == made.height % 16 == 0
    if level == 0:
        assert made == asked
    more = reduced(asked, floor, min(level + 1, MAX_LEVEL), priority)
    assert more.width * more.height * more.steps <= made.width * made.height * made.steps


@pytest.mark.parametrize(
    "level, priority, expected",
    [
        (1, "batch", (832, 480, 40)),
        (1, "standard", (1280, 720, 40)),
        (2, "batch", (832, 480, 20)),
        (2, "standard", (832, 480, 40)),
        (3, "standard", (832, 480, 20)),
        (2, "interactive", (1280, 720, 40)),
        (3, "interactive", (832, 480, 40)),
    ],
)
def test_a_smaller_picture_first_then_fewer_steps(
    level: int, priority: Priority, expected: tuple[int, int, int]
) -> None:
    assert reduced(ASKED, FLOOR, level, priority) == Amount(*expected)


def test_shapes() -> None:
    for asked, expected in (((720, 1280), (480, 832)), ((1024, 1024), (640, 640)), ((832, 480), (832, 480))):
        made = reduced(Amount(*asked, 40), Floor(832, 480), 1, "batch")
        assert (made.width, made.height) == expected
    assert reduced(Amount(640, 480, 40), Floor(832, 480, 10), 1, "batch") == Amount(640, 480, 20)  # steps come next


@pytest.mark.parametrize("value", ["always", "", {}, {"min_size": "big"}, {"min_steps": 0}, {"min_steps": "20"}, 7])
def test_what_is_no_floor(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^'degrade' is "):
        Floor.parse(value)
    with pytest.raises(InvalidRequest, match="multiples of 16"):
        Floor.parse({"min_size": "830x480"})


def test_floors_as_requests_spell_them() -> None:
    assert Floor.parse("never") is None
    for said in ({"min_size": "832x480", "min_steps": 20}, {"min_size": "64x64"}, {"min_steps": 3}):
        floor = Floor.parse(said)
        assert floor is not None and floor.to_json() == said


def played(pressures: Sequence[float | None], every_s: float = 5.0, may_rise: bool = True) -> list[int]:
    """Return the level after each look."""
    state, levels = Level(), []
    for nth, pressure in enumerate(pressures):
        state = steer(state, pressure, may_rise, 1000.0 + nth * every_s)
        levels.append(state.level)
    return levels


def test_a_step_of_load_makes_four_changes_an_hour_at_most() -> None:
    """Half an hour at 1.8 times the target, then an hour at half of it: up to 2, and down to 0."""
    levels = played([1.8] * 360 + [0.5] * 730)
    assert levels[11] == 0 and levels[12] == 1 and max(levels) == 2 and levels[-1] == 0
    changes = [nth for nth in range(1, len(levels)) if levels[nth] != levels[nth - 1]]
    assert len(changes) == 4
    assert levels[360 + 359] == 2 and levels[360 + 361] == 1


def test_a_load_between_two_levels_swings_slowly() -> None:
    """Each level ends the load that made it rise, and without it the load is back at once."""
    state, changes = Level(), 0
    for second in range(0, 10 * 3600, 5):
        after = steer(state, 1.5 if state.level == 0 else 0.1, True, float(second))
        changes += after.level != state.level
        state = after
    assert changes <= 4 * 10


def test_between_the_thresholds_nothing_moves() -> None:
    assert set(played([0.7, 0.99] * 500)) == {0}
    assert set(played([1.2] * 20 + [0.7, 1.4] * 500)[20:]) == {1}
    assert set(played([1.2, 0.9] * 500)) == {0}  # never over for a minute


def test_while_groups_can_still_be_started_nothing_rises() -> None:
    assert set(played([9.0] * 500, may_rise=False)) == {0}


def test_what_is_not_known_moves_nothing() -> None:
    assert set(played([1.2] * 13 + [None] * 500)[13:]) == {1}


@given(st.lists(st.none() | st.floats(0, 5), max_size=300), st.sampled_from((1.0, 5.0, 30.0)))
def test_one_level_at_a_time_and_one_a_minute(pressures: list[float | None], every_s: float) -> None:
    levels = [0, *played(pressures, every_s)]
    changes = [nth for nth in range(1, len(levels)) if levels[nth] != levels[nth - 1]]
    assert all(abs(levels[nth] - levels[nth - 1]) == 1 for nth in changes)
    assert all((later - before) * every_s >= 60 for before, later in pairwise(changes))
