"""The step `interpolate`: frames at another rate, those in between made by motion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from serve_app.finish.motion import motion
from serve_app.finish.ordered import ordered_map

Between = Callable[[np.ndarray, np.ndarray, list[float]], list[np.ndarray]]
"""Makes frames between two: takes both, and times from 0 to 1 in between."""


@dataclass(frozen=True)
class _Pair:
    """Two consecutive frames and the times of the frames that come out between them.

    Attributes:
        first: a frame.
        second: the next one; None after the last frame.
        times: from 0, which is the first frame itself, to below 1.
    """

    first: np.ndarray
    second: np.ndarray | None
    times: list[Fraction]


def interpolate(
    frames: Iterable[np.ndarray], fps: int, wanted: int, pool: Executor, ahead: int, between: Between | None = None
) -> Iterator[np.ndarray]:
    """Yield the frames of a video at a higher rate. Frames at the times of the source's are the source's own.

    Args:
        frames: of the source, `[height, width, 3]`, uint8 RGB.
        fps: frames per second of the source.
        wanted: frames per second that come out, at least `fps`.
        pool: threads that make frames.
        ahead: pairs of frames that are worked on at a time.
        between: makes the frames; None is by optical flow.
    """
    make = between or by_flow

    def work(pair: _Pair) -> list[np.ndarray]:
        times = [float(time) for time in pair.times if time]
        made = make(pair.first, pair.second, times) if times and pair.second is not None else []
        return [pair.first, *made] if not pair.times[0] else made

    for several in ordered_map(pool, work, _pairs(frames, Fraction(fps, wanted)), ahead):
        yield from several


def by_flow(first: np.ndarray, second: np.ndarray, times: list[float]) -> list[np.ndarray]:
    """Return the frames at these times between two frames, by optical flow."""
    moving = motion(first, second)
    return [moving.at(time) for time in times]


def _pairs(frames: Iterable[np.ndarray], step: Fraction) -> Iterator[_Pair]:
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
                yield _Pair(last, frame, times)
        last = frame
    if last is not None and place == 0:
        yield _Pair(last, None, [place])
