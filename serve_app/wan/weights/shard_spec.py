"""The shard spec: which slice of each of an expert's tensors a rank of a group holds, and in which dtype.

Knows the model and the scheme by which DeepSpeed cuts it. Needs no group: `prepare` asks for ranks that do not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel

from serve_app.compat.model import float32_modules
from serve_app.errors import CheckpointError
from serve_app.wan.weights.checkpoint import Checkpoint, Expert
from serve_app.wan.weights.cut import cut_dim
from serve_app.wan.weights.reader import Weights

T = TypeVar("T")

_READERS = 4
"""Number of threads that read the weights of an expert."""


def empty_expert(checkpoint: Checkpoint, expert: Expert) -> Any:
    """Return the whole expert, a `WanTransformer3DModel`, without memory for its parameters."""
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(checkpoint.expert_config(expert))
    return model.eval().requires_grad_(False)


def shard_shapes(checkpoint: Checkpoint, expert: Expert, size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an expert's parameters on each of `size` ranks, by name."""
    shapes = {}
    for name, parameter in empty_expert(checkpoint, expert).named_parameters():
        shape, dim = list(parameter.shape), cut_dim(name)
        if dim is not None:
            shape[dim] //= size
        shapes[name] = tuple(shape)
    return shapes


@dataclass(frozen=True)
class ShardSlice:
    """A rank's slice of a tensor: `start:stop` along `dim`, of shape `shape`, as `dtype`."""

    name: str
    dim: int
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the slice in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def shard_slices(
    shapes: Mapping[str, tuple[int, ...]], weights: Weights, rank: int, size: int, dtype: torch.dtype
) -> list[ShardSlice]:
    """Return the slices of `weights` that a rank holds.

    Args:
        shapes: shapes of the rank's parameters by name.
        weights: the tensors to slice.
        rank: index of the rank.
        size: number of ranks that share the weights.
        dtype: dtype of the parameters; those of modules that diffusers keeps in float32 are float32.

    Raises:
        CheckpointError: the weights are not those of such a model.
    """
    unused = weights.names()
    found = []
    for name, shape in shapes.items():
        if name not in unused:
            raise CheckpointError(f"{weights.where}: the tensor {name!r} is missing, expected by config.json")
        unused.remove(name)
        dim, expected = cut_dim(name), list(shape)
        if dim is not None:
            expected[dim] *= size
        if tuple(expected) != weights.shape(name):
            raise CheckpointError(
                f"{weights.where}: the tensor {name!r} has shape {weights.shape(name)}, expected {tuple(expected)}"
            )
        start = 0 if dim is None else rank * shape[dim]
        found.append(ShardSlice(name, dim or 0, start, start + shape[dim or 0], shape, _dtype_of(name, dtype)))
    # Files of the image-to-video model have it, without a place in the model; diffusers ignores it as well.
    unused = {name for name in unused if "norm_added_q" not in name}
    if unused:
        raise CheckpointError(f"{weights.where}: the tensor {min(unused)!r} is not expected by config.json")
    return found


def read_in_file_order(
    slices: Iterable[ShardSlice], weights: Weights, read: Callable[[ShardSlice], T]
) -> Iterator[tuple[ShardSlice, T]]:
    """Yield each slice with the result of `read`, in the order in which the slices lie in the files.

    Several are read at once, since one core computes checksums more slowly than a disk reads. If values are converted,
    they are read one by one: a conversion uses all cores by itself.

    Raises:
        CheckpointError: raised by `read`; no further slice is begun then.
    """
    ordered = sorted(slices, key=lambda part: weights.position(part.name))
    if any(weights.dtype(part.name) != part.dtype for part in ordered):
        yield from ((part, read(part)) for part in ordered)
        return
    with ThreadPoolExecutor(_READERS, "weights") as readers:
        yield from zip(ordered, readers.map(read, ordered), strict=True)


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter in a model whose other parameters are `dtype`."""
    # As diffusers' own loader compares: with a whole part of the path, not a substring.
    float32 = float32_modules()
    return torch.float32 if float32.intersection(name.split(".")) else dtype
