from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from serve_app.finish.interpolate import interpolate
from serve_app.finish.motion import motion
from tests.support.films import pan, psnr, shifted, texture


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def blend(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return cv2.addWeighted(first, 0.5, second, 0.5, 0)


def test_frames_in_between_lie_on_the_way(pool: ThreadPoolExecutor) -> None:
    frames = pan(9, step=2.5)
    made = list(interpolate(iter(frames[::2]), 8, 16, pool, 3))
    assert len(made) == 9
    for index, (one, truth) in enumerate(zip(made, frames, strict=True)):
        if index % 2 == 0:
            assert np.array_equal(one, truth)
        else:
            blended = psnr(blend(frames[index - 1], frames[index + 1]), truth)
            assert psnr(one, truth) > 38 and psnr(one, truth) > blended + 15


def test_what_accelerates_is_followed(pool: ThreadPoolExecutor) -> None:
    picture = texture(1)
    frames = [shifted(picture, 14 * math.sin(index / 3)) for index in range(13)]
    made = list(interpolate(iter(frames[::2]), 8, 16, pool, 3))
    straight = [motion(frames[index - 1], frames[index + 1]).at(0.5) for index in range(1, 12, 2)]
    gains = [psnr(made[index], frames[index]) - psnr(straight[index // 2], frames[index]) for index in range(3, 10, 2)]
    assert np.mean(gains) > 3, gains


def test_what_comes_into_sight_is_not_smeared(pool: ThreadPoolExecutor) -> None:
    """Move a picture over a ground that stands still: beside it comes what only one of two frames shows."""
    ground, square = texture(2, 240, 320), texture(5, 80, 80)[32:-32, 32:-32]
    frames = [shifted(ground, 0) for _ in range(5)]
    for index, frame in enumerate(frames):
        frame[80:160, 53 + 4 * index : 133 + 4 * index] = square
    made = list(interpolate(iter(frames[::2]), 8, 16, pool, 3))
    for index in (1, 3):
        assert psnr(made[index], frames[index]) > psnr(blend(frames[index - 1], frames[index + 1]), frames[index]) + 8


def test_a_cut_shows_no_picture_of_both(pool: ThreadPoolExecutor) -> None:
    frames = [texture(seed)[32:-32, 32:-32].copy() for seed in range(5)]
    made = list(interpolate(iter(frames), 16, 48, pool, 3))
    assert len(made) == 13
    for place, one in enumerate(made):
        assert np.array_equal(one, frames[round(place / 3)])
    assert motion(frames[0], frames[1]).kind == "cut"


def test_repeated_frames_stay_equal(pool: ThreadPoolExecutor) -> None:
    frames = [frame for frame in pan(3) for _ in range(2)]
    made = list(interpolate(iter(frames), 16, 32, pool, 3))
    assert np.array_equal(made[1], frames[0]) and np.array_equal(made[5], frames[2])
    assert motion(frames[0], frames[1]).kind == "same"


@pytest.mark.parametrize(
    ("fps", "wanted"), [(16, 32), (16, 48), (16, 60), (16, 24), (24, 60), (16, 17), (7, 32), (16, 16)]
)
@pytest.mark.parametrize("frames", [1, 2, 6])
def test_times_and_number_of_frames(pool: ThreadPoolExecutor, fps: int, wanted: int, frames: int) -> None:
    """Read the time of each frame from its brightness, which an operator's model would make."""

    def model(first: np.ndarray, second: np.ndarray, times: list[float]) -> list[np.ndarray]:
        return [first + (second - first) * time for time in times]

    source = [np.full((2, 2, 3), float(index)) for index in range(frames)]
    made = [float(one[0, 0, 0]) for one in interpolate(iter(source), fps, wanted, pool, 2, model)]
    assert len(made) == (frames - 1) * wanted // fps + 1
    assert made == pytest.approx([place * fps / wanted for place in range(len(made))])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (15, 100), (17, 19), (33, 101)])
def test_sizes_of_all_kinds(pool: ThreadPoolExecutor, height: int, width: int) -> None:
    frames = [np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8) for seed in range(2)]
    made = list(interpolate(iter(frames), 16, 32, pool, 1))
    assert [one.shape for one in made] == [(height, width, 3)] * 3


def test_frames_come_out_before_the_last_came_in(pool: ThreadPoolExecutor) -> None:
    taken = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal taken
        for frame in pan(4, height=32, width=32) * 8:
            taken += 1
            yield frame

    made = interpolate(frames(), 16, 32, pool, 2)
    next(made)
    assert taken < 10
    made.close()  # type: ignore[attr-defined]
