"""Which part of an expert's tensors each rank of a group holds, and as which dtype.

Knows the model and the scheme by which DeepSpeed cuts it, but needs no group: `prepare` asks for ranks that do not run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel

from serve_app.compat import float32_modules
from serve_app.errors import CheckpointError
from serve_app.wan.weights.checkpoint import Checkpoint, Expert
from serve_app.wan.weights.reader import Weights

T = TypeVar("T")

_READERS = 4
"""Threads that read the weights of an expert."""

# Column-parallel layers have some of the outputs, those of the rank's heads; the norms of these outputs follow. Row-
# parallel ones have some of the inputs and are summed over the ranks: their bias, added after that, is whole. In cross-
# attention ranks share keys and values alone, see `CrossAttention`.
_CUT = re.compile(
    r"blocks\.\d+\.(?:"
    r"(?P<outputs>(?:attn1\.(?:to_q|norm_q)|attn[12]\.(?:to_[kv]|norm_k)|ffn\.net\.0\.proj)\.(?:weight|bias))"
    r"|(?P<inputs>(?:attn1\.to_out\.0|ffn\.net\.2)\.weight))"
)


def empty_expert(checkpoint: Checkpoint, expert: Expert) -> Any:
    """The whole expert, a `WanTransformer3DModel`, without memory for its parameters."""
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(checkpoint.expert_config(expert))
    return model.eval().requires_grad_(False)


def cut_dim(name: str) -> int | None:
    """The dimension along which the ranks of a group share a parameter of an expert; None if each has all of it."""
    found = _CUT.fullmatch(name)
    if found is None:
        return None
    return 0 if found["outputs"] else 1


def shard_shapes(checkpoint: Checkpoint, expert: Expert, size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of an expert's parameters on each of `size` ranks, without a group of so many."""
    shapes = {}
    for name, parameter in empty_expert(checkpoint, expert).named_parameters():
        shape, dim = list(parameter.shape), cut_dim(name)
        if dim is not None:
            shape[dim] //= size
        shapes[name] = tuple(shape)
    return shapes


@dataclass(frozen=True)
class ShardSlice:
    """What a rank holds of a tensor: `start:stop` along `dim`, of this shape, as `dtype`."""

    name: str
    dim: int
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of it."""
        return math.prod(self.shape) * self.dtype.itemsize


def shard_slices(
    shapes: Mapping[str, tuple[int, ...]], weights: Weights, rank: int, size: int, dtype: torch.dtype
) -> list[ShardSlice]:
    """What a rank takes of `weights`.

    Args:
        shapes: of what it holds, by parameter.
        dtype: of the parameters; those of modules that diffusers keeps in float32 are float32.

    Raises:
        CheckpointError: the weights are not those of such a model.
    """
    missing = weights.names()
    found = []
    for name, shape in shapes.items():
        if name not in missing:
            raise CheckpointError(f"{weights.where}: the tensor {name!r} is missing, expected by config.json")
        missing.remove(name)
        dim, expected = cut_dim(name), list(shape)
        if dim is not None:
            expected[dim] *= size
        if tuple(expected) != weights.shape(name):
            raise CheckpointError(
                f"{weights.where}: the tensor {name!r} has shape {weights.shape(name)}, expected {tuple(expected)}"
            )
        start = 0 if dim is None else rank * shape[dim]
        found.append(ShardSlice(name, dim or 0, start, start + shape[dim or 0], shape, _dtype_of(name, dtype)))
    # Present in files of the image-to-video sibling, without a place in the model; diffusers ignores it as well.
    missing = {name for name in missing if "norm_added_q" not in name}
    if missing:
        raise CheckpointError(f"{weights.where}: the tensor {min(missing)!r} is not expected by config.json")
    return found


def each(
    parts: Iterable[ShardSlice], weights: Weights, do: Callable[[ShardSlice], T]
) -> Iterator[tuple[ShardSlice, T]]:
    """What `do` makes of each piece when it has read it, in the order in which they lie in the files.

    Several are read at once: one core compares checksums more slowly than a disk reads. Not where values are converted,
    which takes all cores by itself.

    Raises:
        CheckpointError: what `do` raises of a piece; no further one is begun then.
    """
    ordered = sorted(parts, key=lambda part: weights.position(part.name))
    if any(weights.dtype(part.name) != part.dtype for part in ordered):
        yield from ((part, do(part)) for part in ordered)
        return
    with ThreadPoolExecutor(_READERS, "weights") as readers:
        yield from zip(ordered, readers.map(do, ordered), strict=True)


def held_bytes(weights: Weights, dtype: torch.dtype, tensor: int) -> dict[str, float]:
    """Memory of an expert's parameters on one of `tensor` ranks, by name."""
    return {
        name: math.prod(weights.shape(name))
        * _dtype_of(name, dtype).itemsize
        / (1 if cut_dim(name) is None else tensor)
        for name in weights.names()
    }


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """That of a parameter in a model whose others are `dtype`."""
    # Called by the name that diffusers' own loader goes by: a part of the path, not a substring.
    float32 = float32_modules()
    return torch.float32 if float32.intersection(name.split(".")) else dtype
