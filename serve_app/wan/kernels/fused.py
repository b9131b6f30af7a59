"""Fused operations of a compiled block on CUDA: one kernel each, where the compiler takes several or a slower one.

They round where the compiler's kernels round, and are no less exact: values in between stay in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from serve_app.compat.model import linear_gelu
from serve_app.wan.parallel.tensor_parallel import ColumnParallel

_WARPS, _WARPS_MODULATED = 4, 4
_WARPS_SQUARED, _ROWS_SQUARED, _SOME_SQUARED = 8, 4, 1024
"""Warps and tokens of a program of `square_sums`, and features that it reads at a time."""
_ROWS = 2
"""Tokens of a program that share one read of scale and shift, which are larger than a token."""


class LinearGelu(nn.Module):
    """A linear layer with GELU in the kernel of its product, in place of diffusers' `GELU` with tanh approximation.

    Args:
        proj: the linear layer, `weight` `[features out, features in]`, `bias` `[features out]`; or a `ColumnParallel`,
            which gathers the tokens of several ranks first.
    """

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return `[..., features out]` for `hidden`, `[..., features in]`."""
        if isinstance(self.proj, ColumnParallel):
            return self.proj(hidden, gelu=True)
        activated: torch.Tensor = torch.ops.wan_serve.linear_gelu(hidden, self.proj.weight, self.proj.bias)
        return activated


@torch.library.custom_op("wan_serve::linear_gelu", mutates_args=())
def _linear_gelu(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1])
    # On CUDA alone this is the tanh approximation.
    activated = linear_gelu(rows, weight, bias)
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
    """Normalise over all heads together (RMSNorm), and rotate pairs of neighbouring features of each head.

    Args:
        hidden: `[batch, tokens, own heads * head features]`.
        norm: has `weight`, `[own heads * head features]`, `eps` and, with `squares`, `features`, those of all ranks.
        squares: sum of squares over the heads of all ranks, `[batch, tokens, 1]`, float32; None for one rank.
        cos: `[1, tokens, 1, head features]`, float32, both values of a pair being the same.
        sin: like `cos`.

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


def square_sums(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sums of squares of tensors `[batch, tokens, width]` over their last dimension, in float32.

    Those of all tensors lie behind each other, `[batch, tokens of all tensors, 1]`.
    """
    sums: torch.Tensor = torch.ops.wan_serve.square_sums(list(parts))
    return sums


@torch.library.custom_op("wan_serve::square_sums", mutates_args=())
def _square_sums(parts: list[torch.Tensor]) -> torch.Tensor:
    sums = _allocate_sums(parts)
    first = 0
    for part in parts:
        batch, tokens, width = part.shape
        _kernels().square_sums[(-(-tokens // _ROWS_SQUARED), batch)](
            part.contiguous(),
            sums,
            tokens,
            sums.shape[1],
            first,
            WIDTH=width,
            SOME=_SOME_SQUARED,
            ROWS=_ROWS_SQUARED,
            num_warps=_WARPS_SQUARED,
        )
        first += tokens
    return sums


@_square_sums.register_fake
def _allocate_sums(parts: list[torch.Tensor]) -> torch.Tensor:
    """Allocate what `_square_sums` returns."""
    tokens = sum(part.shape[1] for part in parts)
    return parts[0].new_empty(parts[0].shape[0], tokens, 1, dtype=torch.float32)


def norm_modulate(hidden: torch.Tensor, modulation: torch.Tensor, first: int, eps: float) -> torch.Tensor:
    """Normalise each token and modulate it: LayerNorm times one plus a scale, plus a shift.

    Args:
        hidden: `[batch, tokens, width]`.
        modulation: `[batch, rows, width]`, float32.
        first: the row of `modulation` that is the shift; the next one is the scale.
        eps: added to the variance.

    Returns:
        A tensor of the shape of `hidden`.
    """
    modulated: torch.Tensor = torch.ops.wan_serve.norm_modulate(hidden, modulation, first, eps)
    return modulated


def add_norm_modulate(
    hidden: torch.Tensor, added: torch.Tensor, modulation: torch.Tensor, first: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of `hidden` and `added`, and what `norm_modulate` makes of the sum."""
    total, modulated = torch.ops.wan_serve.add_norm_modulate(hidden, added, modulation, first, eps)
    return total, modulated


@torch.library.custom_op("wan_serve::norm_modulate", mutates_args=())
def _norm_modulate(hidden: torch.Tensor, modulation: torch.Tensor, first: int, eps: float) -> torch.Tensor:
    return _modulated(hidden, None, modulation, first, eps)[1]


@_norm_modulate.register_fake
def _(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("wan_serve::add_norm_modulate", mutates_args=())
def _add_norm_modulate(
    hidden: torch.Tensor, added: torch.Tensor, modulation: torch.Tensor, first: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _modulated(hidden, added, modulation, first, eps)


@_add_norm_modulate.register_fake
def _(hidden: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden), torch.empty_like(hidden)


def _modulated(
    hidden: torch.Tensor, added: torch.Tensor | None, modulation: torch.Tensor, first: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, modulation = hidden.contiguous(), modulation.contiguous()
    batch, tokens, width = hidden.shape
    total, output = hidden if added is None else torch.empty_like(hidden), torch.empty_like(hidden)
    kernels = _kernels()
    kernels.norm_modulate[(-(-tokens // _ROWS), batch)](
        hidden,
        hidden if added is None else added.contiguous(),
        modulation,
        total,
        output,
        tokens,
        first,
        eps,
        WIDTH=width,
        WIDE=kernels.next_power_of_2(width),
        KINDS=modulation.shape[1],
        ROWS=_ROWS,
        ADDED=added is not None,
        num_warps=_WARPS_MODULATED,
    )
    return total, output


@functools.cache
def _kernels() -> Any:
    from serve_app.wan.kernels import triton_kernels

    return triton_kernels
