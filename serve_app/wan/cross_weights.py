"""The whole weights of a cross-attention whose heads ranks share, and of its text's keys and values.

Each rank has a run of the tokens there. To give it the whole weights takes a tenth of the bytes that it takes to bring
the tokens to the weights and back, and nobody has to wait: they come while the block's first norm is made.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from serve_app.wan import exchange


class CrossWeights(NamedTuple):
    """Of all heads.

    Attributes:
        keys_values: `[2, batch, tokens, heads, features]`.
        query, query_bias: of the layer that makes queries, `[width, width]` and `[width]`.
        query_norm: `[width]`.
        output: of the layer behind the attention, `[width, width]`. Its bias is whole on every rank.
    """

    keys_values: torch.Tensor
    query: torch.Tensor
    query_bias: torch.Tensor
    query_norm: torch.Tensor
    output: torch.Tensor


class Coming(NamedTuple):
    """Parts of all ranks on their way, `[ranks, numbers]`, and of this one's own keys and values."""

    parts: torch.Tensor
    keys_values: torch.Tensor


_WORK: dict[int, Any] = {}
"""What to wait for before parts are used, by where they lie: what is compiled takes tensors alone."""


def begin(attn: Any, keys_values: torch.Tensor, group: Any) -> Coming:
    """Ask for them.

    Args:
        attn: with this rank's heads, a `WanAttention`.
        keys_values: of the text, of this rank's heads, `[2, batch, tokens, own heads, features]`.
    """
    own = (keys_values, attn.to_q.weight, attn.to_q.bias, attn.norm_q.weight, attn.to_out[0].weight)
    parts, work = exchange.stack(torch.cat([one.reshape(-1) for one in own]), group)
    _WORK.clear()  # what was left behind by a pass that failed
    if work is not None:
        _WORK[parts.data_ptr()] = work
    return Coming(parts, keys_values)


def finish(coming: Coming, width: int) -> CrossWeights:
    """Those that `begin` asked for.

    Args:
        width: features of all heads.
    """
    return CrossWeights(*torch.ops.wan_serve.cross_weights(coming.parts, coming.keys_values, width))


@torch.library.custom_op("wan_serve::cross_weights", mutates_args=())
def _cross_weights(
    parts: torch.Tensor, keys_values: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    work = _WORK.pop(parts.data_ptr(), None)
    if work is not None:
        work.wait()  # the stream waits, not this thread
    own = width // len(parts)
    shapes = [tuple(keys_values.shape), (own, width), (own,), (own,), (width, own)]
    found = [
        part.unflatten(1, shape)
        for part, shape in zip(parts.split([math.prod(shape) for shape in shapes], dim=1), shapes, strict=True)
    ]
    keys, query, bias, norm, output = found
    return (
        keys.permute(1, 2, 3, 0, 4, 5).flatten(3, 4),
        query.reshape(width, width),
        bias.reshape(width),
        norm.reshape(width),
        output.transpose(0, 1).reshape(width, width),
    )


@_cross_weights.register_fake
def _(
    parts: torch.Tensor, keys_values: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    own = keys_values.shape
    return (
        parts.new_empty(*own[:3], own[3] * parts.shape[0], own[4]),
        parts.new_empty(width, width),
        parts.new_empty(width),
        parts.new_empty(width),
        parts.new_empty(width, width),
    )
