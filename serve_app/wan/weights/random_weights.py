"""Random weights, for measurements of speed and memory, which do not depend on the values.

Names, shapes and dtypes come from files whose content is not read. Zeros would not do: chips are faster on them.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import nn

from serve_app.wan.weights.reader import Weights

_SPREAD = 0.02


class RandomWeights(Weights):
    """Random tensors of one component by name. Every rank draws the same whole tensor and takes its slice of it.

    Args:
        where: the component's folder, or its only file.
        device: device to draw them on.

    Raises:
        CheckpointError: a file is missing, truncated, or not safetensors.
    """

    def __init__(self, where: Path, device: torch.device) -> None:
        super().__init__(where)
        self._device = device

    def read(
        self,
        name: str,
        dim: int = 0,
        start: int = 0,
        stop: int | None = None,
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
        check: bool = True,
    ) -> torch.Tensor:
        """Return the slice `start:stop` of a tensor along `dim`, on the device, or in `out`."""
        whole = _draw(name, torch.empty(self.shape(name), device=self._device))
        part = whole.narrow(dim, start, (whole.shape[dim] if stop is None else stop) - start)
        if out is None:
            return part.to(dtype or self.dtype(name), copy=True)
        # Converted first: a copy between devices that also converts does so on the host, through more memory.
        return out.copy_(part.to(out.dtype))


def randomise(module: nn.Module) -> None:
    """Replace all parameters of a module by random ones, in place."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            _draw(name, parameter)


def _draw(name: str, tensor: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    tensor.normal_(0, _SPREAD, generator=generator)
    # Norms scale by about one, or the outputs of the model would vanish.
    return tensor.add_(1) if "norm" in name and name.endswith(("weight", "gamma")) else tensor
