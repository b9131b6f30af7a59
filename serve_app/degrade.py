"""Less than a video was asked with, where its request allows that: the floor, the sizes above it, and the levels.

Pure. Knows neither the queue nor the model. Sizes are in pixels, times in seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.parameters import SIDE_MULTIPLE, Priority

NEVER = "never"
MAX_LEVEL = 3
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
# Shapes whose ratios of width to height differ by no more than this are taken for the same.
_SAME_SHAPE = 0.05
# The level from which on a class gets less.
_FIRST_LEVEL: dict[Priority, int] = {"batch": 1, "standard": 2, "interactive": 3}
# Share of its target that a wait must exceed for a level to rise to the next one, and for how long.
_RISE_ABOVE = (1.0, 1.5, 2.0)
_RISE_AFTER_S = 60.0
# Share below which it falls by one, and for how long. While a load lasts that one level is too much for and the other
# too little, the level swings: this bounds how often, to two falls and as many rises an hour.
_FALL_BELOW = 0.6
_FALL_AFTER_S = 1800.0


@dataclass(frozen=True)
class Floor:
    """The least that a request agrees to.

    Attributes:
        width, height: of a frame; None if the size must stay.
        steps: denoising steps; None if they must stay.
    """

    width: int | None = None
    height: int | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, value: Any) -> Floor | None:
        """Return the floor of a request's `degrade`; None if it is `never`.

        Raises:
            InvalidRequest: it is neither.
        """
        if value == NEVER:
            return None
        expected = """expected 'never' or {"min_size": "WIDTHxHEIGHT", "min_steps": N}, at least one of both"""
        wrong = InvalidRequest("degrade", f"'degrade' is {repr(value)[:80]}, {expected}.")
        if not isinstance(value, Mapping) or not value or not value.keys() <= {"min_size", "min_steps"}:
            raise wrong
        size, steps = value.get("min_size"), value.get("min_steps")
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if (size is not None and match is None) or (steps is not None and (type(steps) is not int or steps < 1)):
            raise wrong
        width, height = (int(side) for side in match.groups()) if match else (None, None)
        if any(side is not None and side % SIDE_MULTIPLE for side in (width, height)):
            raise InvalidRequest("degrade", f"'degrade' has min_size {size!r}, expected multiples of {SIDE_MULTIPLE}.")
        return cls(width, height, steps)

    def to_json(self) -> dict[str, Any]:
        """Return it as a request spells it."""
        said = {"min_size": f"{self.width}x{self.height}" if self.width else None, "min_steps": self.steps}
        return {name: value for name, value in said.items() if value is not None}


@dataclass(frozen=True)
class Amount:
    """The parameters of a video that may be reduced."""

    width: int
    height: int
    steps: int


def reduced(asked: Amount, floor: Floor | None, level: int, priority: Priority) -> Amount:
    """Return what is made at a level of load: first a smaller picture, then fewer steps, never more than was asked.

    Args:
        asked: what the request asked for.
        floor: what it agrees to; None if to nothing.
        level: 0 (nothing is reduced) to `MAX_LEVEL`.
        priority: the job's class; more urgent classes are reduced at higher levels only.
    """
    notches = level - _FIRST_LEVEL[priority] + 1
    if floor is None or notches < 1:
        return asked
    smaller = _smaller(asked, floor)
    if notches == 1 and smaller != asked:
        return smaller
    if floor.steps is None or floor.steps >= asked.steps:
        return smaller
    return replace(smaller, steps=max(floor.steps, math.ceil(asked.steps / 2)))


def _smaller(asked: Amount, floor: Floor) -> Amount:
    """Return the same shape, or nearly, with as few pixels as the floor allows; `asked` if that is not fewer."""
    if floor.width is None or floor.height is None:
        return asked
    least = floor.width * floor.height
    if least >= asked.width * asked.height:
        return asked
    shape = asked.width / asked.height
    for width, height in ((floor.width, floor.height), (floor.height, floor.width)):
        if abs(width / height / shape - 1) <= _SAME_SHAPE and width <= asked.width and height <= asked.height:
            return replace(asked, width=width, height=height)
    scale = math.sqrt(least / (asked.width * asked.height))
    width, height = (
        min(math.ceil(side * scale / SIDE_MULTIPLE) * SIDE_MULTIPLE, side) for side in (asked.width, asked.height)
    )
    return replace(asked, width=width, height=height)


@dataclass(frozen=True)
class Level:
    """The level of load, and since when it is to change.

    Attributes:
        level: 0 to `MAX_LEVEL`.
        changed_at: time of its last change.
        over_since: time since which waits ask for the next level; None if they do not.
        under_since: time since which waits ask for the level below; None if they do not.
    """

    level: int = 0
    changed_at: float = 0.0
    over_since: float | None = None
    under_since: float | None = None


def steer(state: Level, pressure: float | None, may_rise: bool, now: float) -> Level:
    """Return the level after another look at the queue.

    Between the share at which a level rises and the one at which it falls nothing changes, and neither happens at once:
    so a load that stays the same does not make it swing. It changes by one level at a time, at most once a minute.

    Args:
        state: the level so far.
        pressure: the expected wait as a share of its target, of the class for which that is largest; None if unknown.
        may_rise: whether more replicas would come too late, or not at all.
        now: the time.
    """
    if pressure is None:
        return replace(state, over_since=None, under_since=None)
    over = may_rise and state.level < MAX_LEVEL and pressure > _RISE_ABOVE[state.level]
    under = state.level > 0 and pressure < _FALL_BELOW
    over_since = (now if state.over_since is None else state.over_since) if over else None
    under_since = (now if state.under_since is None else state.under_since) if under else None
    step = 0
    if now - state.changed_at >= _RISE_AFTER_S:
        if over_since is not None and now - over_since >= _RISE_AFTER_S:
            step = 1
        elif under_since is not None and now - under_since >= _FALL_AFTER_S:
            step = -1
    if step:
        return Level(state.level + step, now)
    return replace(state, over_since=over_since, under_since=under_since)
