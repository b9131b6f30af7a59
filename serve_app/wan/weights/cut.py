"""The cut of an expert: which of its parameters the ranks of tensor parallelism divide, and the bytes that each holds.

Reads names and shapes alone. Needs no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

FLOAT32_MODULES = frozenset({"rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})
"""Modules that diffusers keeps in float32 whatever the dtype. A copy of `compat.model.float32_modules`, which needs
torch; a test compares them."""

# A rank's part of a column-parallel layer makes the outputs of the rank's heads; their norms are cut in the same way.
# Its part of a row-parallel layer takes some of the inputs, and the ranks' results are summed: the bias is added after
# that and is whole. In cross-attention only keys and values are cut, see `CrossAttention`.
_CUT = re.compile(
    r"blocks\.\d+\.(?:"
    r"(?P<outputs>(?:attn1\.(?:to_q|norm_q)|attn[12]\.(?:to_[kv]|norm_k)|ffn\.net\.0\.proj)\.(?:weight|bias))"
    r"|(?P<inputs>(?:attn1\.to_out\.0|ffn\.net\.2)\.weight))"
)


def cut_dim(name: str) -> int | None:
    """Return the dimension along which the ranks of a group cut a parameter; None if each rank has all of it."""
    found = _CUT.fullmatch(name)
    if found is None:
        return None
    return 0 if found["outputs"] else 1


def rank_bytes(shapes: Mapping[str, tuple[int, ...]], itemsize: int, tensor: int) -> dict[str, float]:
    """Return the bytes of each of an expert's parameters on one of `tensor` ranks, by name.

    Args:
        shapes: shapes of the whole parameters by name.
        itemsize: size in bytes of a number of the model's dtype.
        tensor: number of ranks that share the weights.
    """
    return {
        name: math.prod(shape)
        * (4 if FLOAT32_MODULES.intersection(name.split(".")) else itemsize)
        / (1 if cut_dim(name) is None else tensor)
        for name, shape in shapes.items()
    }
