"""What a compiled block does in one kernel on CUDA where the compiler takes several.

Rounded where the compiler's kernels round, and no less exact: the values in between stay in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from serve_app.wan.row_parallel import ColumnParallel

_WARPS = 8


class LinearGelu(nn.Module):
    """Stands in for diffusers' `GELU` with its tanh approximation: the product writes what GELU makes of it.

    Args:
        proj: the linear layer, `weight` `[features out, features in]`, `bias` `[features out]`; or one whose tokens are
            on several ranks, which brings them together.
    """

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., features in]` to `[..., features out]`."""
        if isinstance(self.proj, ColumnParallel):
            return self.proj(hidden, gelu=True)
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
    kernel, powers = _kernel()
    kernel[(batch * tokens,)](
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
        MANY=powers(width // head),
        WIDE=powers(head),
        GIVEN=squares is not None,
        num_warps=_WARPS,
    )
    return rotated.unflatten(2, (-1, head))


@_norm_rotate.register_fake
def _(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
    head = others[-1].shape[-1]
    return hidden.new_empty(*hidden.shape[:2], hidden.shape[2] // head, head)


@functools.cache
def _kernel() -> tuple[Any, Any]:
    from serve_app.wan import triton_kernels  # Triton comes with torch for CUDA alone

    return triton_kernels.norm_rotate, triton_kernels.next_power_of_2
