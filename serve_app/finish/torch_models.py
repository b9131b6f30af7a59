"""The operator's models for upscaling and interpolation, run by torch, which is imported when one is loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

_TILE = 384
"""Side in pixels of the largest part of a frame that an upscaling model gets at once."""
_MARGIN = 24
"""Pixels around a tile that the model sees too, so that no seams show."""
_MULTIPLE = 64
"""Sides of frames for an interpolation model are padded to multiples of this, as RIFE and its kin need it."""
MISSING = "expected spandrel and a torchvision made for this torch: pip install 'serve-app[upscale]'"


class UpscalingModel:
    """A model that `spandrel` loads: ESRGAN, SwinIR, DAT and others.

    Args:
        file: its weights.
        device: as torch names it.

    Raises:
        ImportError: spandrel or torchvision is missing.
        ValueError: the file is no such model, or one of another kind.
    """

    def __init__(self, file: Path, device: str) -> None:
        spandrel = _spandrel()
        try:
            model = spandrel.ModelLoader(device="cpu").load_from_file(file)
        except Exception as error:  # whatever the library says of a damaged file
            raise ValueError(f"the upscaling model {file} cannot be read: {_first_line(error)}") from None
        if not isinstance(model, spandrel.ImageModelDescriptor) or (model.input_channels, model.output_channels) != (
            3,
            3,
        ):
            raise ValueError(f"{file} is a {type(model.model).__name__}, expected a model from RGB to RGB")
        self.scale: int = model.scale
        self._lock = threading.Lock()
        self._device = device
        self._model = model.to(device).eval()
        self._half = device.startswith("cuda") and model.supports_half
        if self._half:
            self._model.half()

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Return a frame `[height, width, 3]`, uint8 RGB, with both sides `scale` times as long."""
        import torch

        height, width = frame.shape[:2]
        out = np.empty((height * self.scale, width * self.scale, 3), np.uint8)
        with self._lock, torch.inference_mode():
            for top, left in _corners(height, width):
                bottom, right = min(top + _TILE, height), min(left + _TILE, width)
                above, before = max(top - _MARGIN, 0), max(left - _MARGIN, 0)
                part = frame[above : bottom + _MARGIN, before : right + _MARGIN]
                made = _to_frame(self._model(_to_tensor(part, self._device, self._half)))
                y, x = (top - above) * self.scale, (left - before) * self.scale
                down, across = (bottom - top) * self.scale, (right - left) * self.scale
                out[top * self.scale :, left * self.scale :][:down, :across] = made[y : y + down, x : x + across]
        return out


class InterpolationModel:
    """A TorchScript module `(first, second, time) -> frame`, such as RIFE exported with `torch.jit.script`.

    Frames are float32 `[1, 3, height, width]` from 0 to 1, with sides padded to multiples of 64. The time is float32
    `[1, 1, 1, 1]`, from 0 (`first`) to 1.

    Args:
        file: the module, as `torch.jit.save` writes it.
        device: as torch names it.

    Raises:
        ValueError: the file is no such module.
    """

    def __init__(self, file: Path, device: str) -> None:
        import torch

        try:
            self._module = torch.jit.load(str(file), map_location=device).eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the interpolation model {file} cannot be read: {_first_line(error)}") from None
        self._lock = threading.Lock()
        self._device = device

    def __call__(self, first: np.ndarray, second: np.ndarray, times: list[float]) -> list[np.ndarray]:
        """Return the frames at these times between two frames `[height, width, 3]`, uint8 RGB."""
        import torch

        height, width = first.shape[:2]
        padding = ((0, -height % _MULTIPLE), (0, -width % _MULTIPLE), (0, 0))
        with self._lock, torch.inference_mode():
            pair = [_to_tensor(np.pad(frame, padding, "edge"), self._device, False) for frame in (first, second)]
            made = [self._module(*pair, torch.full((1, 1, 1, 1), time, device=self._device)) for time in times]
            return [_to_frame(one)[:height, :width].copy() for one in made]


# A replica finishes one video after the other, and loads each model once.
load_upscaler: Callable[[Path, str], UpscalingModel] = lru_cache(4)(UpscalingModel)
load_interpolator: Callable[[Path, str], InterpolationModel] = lru_cache(4)(InterpolationModel)


def _spandrel() -> Any:
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises RuntimeError
        raise ImportError(f"{_first_line(error)}, {MISSING}") from None
    return spandrel


def _corners(height: int, width: int) -> list[tuple[int, int]]:
    return [(top, left) for top in range(0, height, _TILE) for left in range(0, width, _TILE)]


def _to_tensor(frame: np.ndarray, device: str, half: bool) -> Any:
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(frame)).to(device).permute(2, 0, 1)[None]
    return (tensor.half() if half else tensor.float()) / 255


def _to_frame(tensor: Any) -> np.ndarray:
    pixels = (tensor[0].float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    frame: np.ndarray = pixels.cpu().numpy()
    return frame


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
