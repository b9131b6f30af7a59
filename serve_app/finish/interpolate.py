"""The step `interpolate`: frames at another rate, those in between made by motion or by an operator's model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Protocol

import numpy as np

from serve_app.finish.motion import Motion, motion
from serve_app.finish.ordered import Pool, ordered_map


class Between(Protocol):
    """A model that makes frames between two."""

    def __call__(self, first: np.ndarray, second: np.ndarray, times: list[float]) -> list[np.ndarray]:
        """Return the frames at these times, from 0 (`first`) to 1."""


@dataclass(frozen=True)
class Pair:
    """Two consecutive frames and the times of the frames that come out between them.

    Attributes:
        first: a frame.
        second: the next one; None after the last frame.
        times: from 0, which is the first frame itself, to below 1.
        motion: from the first to the second; None as long as it is not measured, or if no frame in between is wanted.
    """

    first: np.ndarray
    second: np.ndarray | None
    times: list[Fraction]
    motion: Motion | None = None

    @property
    def between(self) -> list[float]:
        """Times of the frames that have to be made."""
        return [float(time) for time in self.times if time]

    def with_made(self, made: list[np.ndarray]) -> list[np.ndarray]:
        """Return all frames that come out, given those in between."""
        return made if self.times[0] else [self.first, *made]


def measured(pair: Pair) -> Pair:
    """Return a pair with its motion."""
    if pair.second is None or not pair.between:
        return pair
    return replace(pair, motion=motion(pair.first, pair.second))


def made_by_flow(pairs: tuple[Pair | None, Pair, Pair | None]) -> list[np.ndarray]:
    """Return the frames of the middle one of three pairs in a row; the others tell how its motion accelerates."""
    before, pair, after = pairs
    if pair.motion is None:
        return pair.with_made([])
    moving = pair.motion.bent(before.motion if before else None, after.motion if after else None)
    return pair.with_made([moving.at(time) for time in pair.between])


def interpolate(
    frames: Iterable[np.ndarray], fps: int, wanted: int, pool: Pool, ahead: int, model: Between | None = None
) -> Iterator[np.ndarray]:
    """Yield the frames of a video at a higher rate. Frames at the times of the source's are the source's own.

    Args:
        frames: of the source, `[height, width, 3]`, uint8 RGB.
        fps: frames per second of the source.
        wanted: frames per second that come out, at least `fps`.
        pool: threads that make frames.
        ahead: pairs of frames that are worked on at a time.
        model: makes the frames; None is by optical flow.
    """
    pairs = _pairs(frames, Fraction(fps, wanted))
    if model is None:
        # In two rounds: a frame in between wants the motion after it, too.
        made = ordered_map(pool, made_by_flow, _threes(ordered_map(pool, measured, pairs, ahead)), ahead)
    else:
        made = ordered_map(pool, partial(_made_by_model, model), pairs, ahead)
    for several in made:
        yield from several


def _made_by_model(model: Between, pair: Pair) -> list[np.ndarray]:
    if pair.second is None or not pair.between:
        return pair.with_made([])
    return pair.with_made(model(pair.first, pair.second, pair.between))


def _threes(pairs: Iterable[Pair]) -> Iterator[tuple[Pair | None, Pair, Pair | None]]:
    """Yield each pair with the one before it and the one after it."""
    before: Pair | None = None
    now: Pair | None = None
    for after in pairs:
        if now is not None:
            yield before, now, after
        before, now = now, after
    if now is not None:
        yield before, now, None


def _pairs(frames: Iterable[np.ndarray], step: Fraction) -> Iterator[Pair]:
    """Yield consecutive frames with the times of the frames between them.

    Args:
        frames: the frames.
        step: time between two frames that come out, in frames of the source.
    """
    place = Fraction(0)  # of the next frame that comes out, counted from the last frame that came
    last: np.ndarray | None = None
    for frame in frames:
        if last is not None:
            times = []
            while place < 1:
                times.append(place)
                place += step
            place -= 1
            if times:
                yield Pair(last, frame, times)
        last = frame
    if last is not None and place == 0:
        yield Pair(last, None, [place])
