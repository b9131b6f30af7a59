"""The step `upscale`: larger frames, by Lanczos or by an operator's model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import cv2
import numpy as np

from serve_app.finish.ordered import Pool, ordered_map
from serve_app.finish.torch_models import UpscalingModel

Enlarge = Callable[[np.ndarray], np.ndarray]
"""Makes a frame larger."""


def by_lanczos(factor: int) -> Enlarge:
    """Return a function that makes frames `[height, width, 3]`, uint8 RGB, larger by `factor`."""

    def enlarge(frame: np.ndarray) -> np.ndarray:
        return cv2.resize(frame, None, fx=factor, fy=factor, interpolation=cv2.INTER_LANCZOS4)

    return enlarge


def by_model(model: UpscalingModel, factor: int) -> Enlarge:
    """Return a function that makes frames larger by a model, whose scale may be more than `factor`.

    Raises:
        ValueError: its scale is less.
    """
    if model.scale < factor:
        raise ValueError(f"'upscale.factor' is {factor}, expected at most {model.scale}, which this model makes")

    def enlarge(frame: np.ndarray) -> np.ndarray:
        made = model(frame)
        height, width = (side * factor for side in frame.shape[:2])
        return made if model.scale == factor else cv2.resize(made, (width, height), interpolation=cv2.INTER_AREA)

    return enlarge


def upscale(frames: Iterable[np.ndarray], enlarge: Enlarge, pool: Pool, ahead: int) -> Iterator[np.ndarray]:
    """Yield larger frames, several made at a time."""
    return ordered_map(pool, enlarge, frames, ahead)
