"""Attention over this rank's heads, with a query/key norm that spans the heads of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from serve_app.wan.kernels.backends import Kernel
from serve_app.wan.kernels.fused import norm_rotate, square_sums
from serve_app.wan.parallel.collectives import add_up, gather
from serve_app.wan.parallel.sequence_shard import SequenceShard
from serve_app.wan.parallel.tensor_parallel import column_parallel
from serve_app.wan.transformer.text_cache import TextCache


class ShardedNorm(nn.Module):
    """This rank's slice of an RMSNorm over the features of all heads.

    Args:
        features: of all ranks together, since the mean is over all of them.
        size: number of ranks.
    """

    def __init__(self, features: int, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.features = features
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(features // size, dtype=dtype), requires_grad=False)

    def squares(self, hidden: torch.Tensor) -> torch.Tensor:
        """The sum of squares over this rank's features, `[batch, tokens, 1]`, float32."""
        return hidden.float().square().sum(-1, keepdim=True)

    def forward(self, hidden: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """Normalise by `squares`, summed over all ranks; float32 inside, as `torch.nn.RMSNorm` computes."""
        scale = torch.rsqrt(squares / self.features + self.eps)
        return (hidden.float() * scale * self.weight.float()).type_as(hidden)


class SelfAttention:
    """The counterpart of diffusers' `WanAttnProcessor` in the video's own attention.

    Args:
        kernel: what computes the attention itself.
        group: of the ranks that share the heads, each of which comes with a run of the tokens; None for one rank.
        tokens: those that ranks share; None where each has all.
        fused: whether the norms and the rotation are one kernel.
    """

    def __init__(self, kernel: Kernel, group: Any | None, tokens: SequenceShard | None, fused: bool = False) -> None:
        self.kernel = kernel
        self.group = group
        self.tokens = tokens
        self.fused = fused

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None,
        attention_mask: None,
        rotary_emb: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        cos, sin, *whole = rotary_emb  # see `Rotary`
        run = cos.shape[1]
        layers = (attn.to_q, attn.to_k, attn.to_v)
        if self.group is None:
            query, key, value = (layer(hidden_states) for layer in layers)
        else:
            query, key, value = column_parallel(hidden_states, run, self.group, *layers)
        parts = ((attn.norm_q, query), (attn.norm_k, key))
        if self.fused:
            query, key = _fused(self.group, (cos, sin), *parts)
        else:
            query, key = (
                _rotate(one.unflatten(2, (attn.heads, -1)), cos, sin) for one in _normalised(self.group, *parts)
            )
        value = value.unflatten(2, (attn.heads, -1))
        if self.tokens is not None:
            query, key, value = self.tokens.to_heads(whole[0].shape[0], query, key, value)
        hidden_states = self.kernel(query, key, value, None)
        if self.tokens is not None:
            hidden_states = self.tokens.to_tokens(run, hidden_states)
        output: torch.Tensor = attn.to_out[0](hidden_states.flatten(2, 3).type_as(query))
        return output


class CrossAttention:
    """The counterpart of diffusers' `WanAttnProcessor` in the attention to the text, whose keys and values are given.

    Ranks that share weights have a run of the tokens each, and all heads for it, so that no token has to go anywhere:
    the layers before and after the attention are whole on all of them, a seventh of an expert's weights. Keys and
    values they make together, and keep whole.

    Args:
        kernel: what computes the attention itself.
        group: of the ranks that share weights; None for one rank.
        memory: of keys and values.
    """

    def __init__(self, kernel: Kernel, group: Any | None, memory: TextCache) -> None:
        self.kernel = kernel
        self.group = group
        self.memory = memory

    def keys_values(self, attn: WanAttention, text: torch.Tensor) -> torch.Tensor:
        """What cross-attention makes of a text `[batch, tokens, dim]`: `[2, batch, tokens, heads, features]`."""
        (key,) = _normalised(self.group, (attn.norm_k, attn.to_k(text)))
        own = torch.stack([key, attn.to_v(text)]).unflatten(3, (attn.heads, -1))
        return own if self.group is None else torch.cat(gather(own, self.group), dim=3)

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None,
        rotary_emb: None,
    ) -> torch.Tensor:
        query = attn.norm_q(attn.to_q(hidden_states))
        key, value = encoder_hidden_states.unbind()
        hidden_states = self.kernel(query.unflatten(2, key.shape[2:]), key, value, self.memory.bias)
        attended: torch.Tensor = attn.to_out[0](hidden_states.flatten(2, 3).type_as(query))
        return attended


def _normalised(group: Any | None, *parts: tuple[nn.Module, torch.Tensor]) -> list[torch.Tensor]:
    """Each tensor through its norm."""
    if group is None:
        return [norm(hidden) for norm, hidden in parts]
    own = torch.cat([norm.squares(hidden) for norm, hidden in parts], dim=1)  # type: ignore[operator]
    squares = _of_all_ranks(own, group, *parts)
    return [norm(hidden, one) for (norm, hidden), one in zip(parts, squares, strict=True)]


def _fused(
    group: Any | None, rotary_emb: tuple[torch.Tensor, torch.Tensor], *parts: tuple[nn.Module, torch.Tensor]
) -> list[torch.Tensor]:
    """Each tensor through its norm, by heads and rotated."""
    squares: Sequence[torch.Tensor | None] = [None] * len(parts)
    if group is not None:
        squares = _of_all_ranks(square_sums([hidden for _, hidden in parts]), group, *parts)
    return [norm_rotate(hidden, norm, one, *rotary_emb) for (norm, hidden), one in zip(parts, squares, strict=True)]


def _of_all_ranks(squares: torch.Tensor, group: Any, *parts: tuple[nn.Module, torch.Tensor]) -> Sequence[torch.Tensor]:
    """Each tensor's sums of squares over the features of all ranks. One all-reduce for all of them: a separate one each
    would double the latency, which on a slow link is all there is to such a small message.

    Args:
        squares: over this rank's features, one tensor's tokens behind the other's; changed.
    """
    add_up(squares, group)
    return squares.split([hidden.shape[1] for _, hidden in parts], dim=1)


def _rotate(hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of `[batch, tokens, heads, features]`, pairs being neighbours."""
    even, odd = hidden[..., 0::2], hidden[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(hidden)
