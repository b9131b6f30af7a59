"""What a compiled block does in one kernel on CUDA where the compiler takes several.

Rounded where the compiler's kernels round, and no less exact: the values in between stay in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_WARPS = 8
TILE = (128, 64, 8, 3)
"""Of the attention to the text: queries and keys of a tile, warps, and stages of the loop over the keys
(`python -m benchmarks.kernels` compares them)."""


class LinearGelu(nn.Module):
    """Stands in for diffusers' `GELU` with its tanh approximation: the product writes what GELU makes of it.

    Args:
        proj: the linear layer, `weight` `[features out, features in]`, `bias` `[features out]`.
    """

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., features in]` to `[..., features out]`."""
        activated: torch.Tensor = torch.ops.wan_serve.linear_gelu(hidden, self.proj.weight, self.proj.bias)
        return activated


@torch.library.custom_op("wan_serve::linear_gelu", mutates_args=())
def _linear_gelu(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1])
    # On CUDA alone this is the tanh approximation.
    activated = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    return activated.view(*hidden.shape[:-1], -1)


@_linear_gelu.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0])


def norm_rotate(
    hidden: torch.Tensor,
    norm: Any,
    squares: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """RMSNorm over all heads together and the rotary position embedding of each, pairs being neighbours.

    Args:
        hidden: `[batch, tokens, own heads * head features]`.
        norm: its `weight`, `[own heads * head features]`, its `eps` and, with `squares`, `features` of all ranks.
        squares: their sum over the heads of all ranks, `[batch, tokens, 1]`, float32; None where this rank has all.
        cos, sin: `[1, tokens, 1, head features]`, float32, both of a pair's values the same.

    Returns:
        `[batch, tokens, own heads, head features]`.
    """
    features = hidden.shape[2] if squares is None else norm.features
    rotated: torch.Tensor = torch.ops.wan_serve.norm_rotate(hidden, norm.weight, squares, features, norm.eps, cos, sin)
    return rotated


@torch.library.custom_op("wan_serve::norm_rotate", mutates_args=())
def _norm_rotate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    squares: torch.Tensor | None,
    features: int,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    hidden, cos, sin = hidden.contiguous(), cos.contiguous(), sin.contiguous()
    batch, tokens, width = hidden.shape
    head = cos.shape[-1]
    rotated = torch.empty_like(hidden)
    kernels = _kernels()
    kernels.norm_rotate[(batch * tokens,)](
        hidden,
        weight,
        hidden if squares is None else squares.contiguous(),
        cos,
        sin,
        rotated,
        tokens,
        features,
        eps,
        HEADS=width // head,
        HEAD=head,
        MANY=kernels.next_power_of_2(width // head),
        WIDE=kernels.next_power_of_2(head),
        GIVEN=squares is not None,
        num_warps=_WARPS,
    )
    return rotated.unflatten(2, (-1, head))


@_norm_rotate.register_fake
def _(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
    head = others[-1].shape[-1]
    return hidden.new_empty(*hidden.shape[:2], hidden.shape[2] // head, head)


def attend_text(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Attention to texts whose padding is made of equal tokens: one of them is looked at, and weighs as much as all.

    Args:
        query: `[batch, tokens, heads, head features]`.
        key, value: `[batch, text tokens, heads, head features]`.
        own: how many tokens of each text come before its padding, `[batch]`, int32.

    Returns:
        Of the query's shape.
    """
    attended: torch.Tensor = torch.ops.wan_serve.attend_text(query, key, value, own)
    return attended


@torch.library.custom_op("wan_serve::attend_text", mutates_args=())
def _attend_text(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    if query.device.type != "cuda" or query.dtype == torch.float32:  # which the kernel's products would round
        return _formula(query, key, value, own)
    return attend_in_tiles(query, key, value, own, *TILE)


@_attend_text.register_fake
def _(query: torch.Tensor, *others: Any) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def attend_in_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own: torch.Tensor,
    rows: int,
    keys: int,
    warps: int,
    stages: int,
) -> torch.Tensor:
    """`attend_text` on CUDA by tiles of so many queries and keys."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, tokens, heads, head = query.shape
    attended = torch.empty_like(query)
    kernels = _kernels()
    kernels.attend_text[(-(-tokens // rows), heads, batch)](
        query,
        key,
        value,
        own,
        attended,
        tokens,
        key.shape[1],
        math.log2(math.e) / math.sqrt(head),
        HEADS=heads,
        HEAD=head,
        WIDE=max(16, kernels.next_power_of_2(head)),
        ROWS=rows,
        KEYS=keys,
        num_warps=warps,
        num_stages=stages,
    )
    return attended


def _formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    place = torch.arange(key.shape[1], device=key.device)
    kept = own[:, None].long()
    many = (key.shape[1] - kept).clamp(min=1).float().log()
    weigh = torch.where(place < kept, 0.0, torch.where(place == kept, many, -math.inf))[:, None, None]
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    attended = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=weigh)
    return attended.transpose(1, 2).to(query.dtype).contiguous()


@functools.cache
def _kernels() -> Any:
    from serve_app.wan import triton_kernels  # Triton comes with torch for CUDA alone

    return triton_kernels
