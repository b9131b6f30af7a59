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
        features: number of features of all ranks together, over which the mean is.
        size: number of ranks.
        eps: added to the mean of squares.
        dtype: of the weight.
    """

    def __init__(self, features: int, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.features = features
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(features // size, dtype=dtype), requires_grad=False)

    def squares(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the sum of squares over this rank's features, `[batch, tokens, 1]`, float32."""
        return hidden.float().square().sum(-1, keepdim=True)

    def forward(self, hidden: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """Normalise by `squares`, summed over all ranks; float32 inside, as `torch.nn.RMSNorm` computes."""
        scale = torch.rsqrt(squares / self.features + self.eps)
        return (hidden.float() * scale * self.weight.float()).type_as(hidden)


class SelfAttention:
    """Attention among the tokens of the video, in place of diffusers' `WanAttnProcessor`.

    Args:
        kernel: computes the attention itself.
        group: the ranks that divide the heads, each of which comes with a shard of the tokens; None for one rank.
        shard: this rank's sequence shard; None where ranks do not divide the sequence.
        fused: run the norms and the rotation in one kernel.
    """

    def __init__(self, kernel: Kernel, group: Any | None, shard: SequenceShard | None, fused: bool = False) -> None:
        self.kernel = kernel
        self.group = group
        self.shard = shard
        self.fused = fused

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None,
        attention_mask: None,
        rotary_emb: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """Return what the tokens take from each other, of the shape of `hidden_states`, `[batch, tokens, width]`."""
        cos, sin, *whole = rotary_emb  # see `Rotary`
        own_tokens = cos.shape[1]
        layers = (attn.to_q, attn.to_k, attn.to_v)
        if self.group is None:
            query, key, value = (layer(hidden_states) for layer in layers)
        else:
            query, key, value = column_parallel(hidden_states, own_tokens, self.group, *layers)
        parts = ((attn.norm_q, query), (attn.norm_k, key))
        if self.fused:
            query, key = _fused(self.group, (cos, sin), *parts)
        else:
            query, key = (
                _rotate(one.unflatten(2, (attn.heads, -1)), cos, sin) for one in _normalised(self.group, *parts)
            )
        value = value.unflatten(2, (attn.heads, -1))
        if self.shard is not None:
            query, key, value = self.shard.to_heads(whole[0].shape[0], query, key, value)
        hidden_states = self.kernel(query, key, value, None)
        if self.shard is not None:
            hidden_states = self.shard.to_tokens(own_tokens, hidden_states)
        output: torch.Tensor = attn.to_out[0](hidden_states.flatten(2, 3).type_as(query))
        return output


class CrossAttention:
    """Attention to the text, in place of diffusers' `WanAttnProcessor`; takes keys and values, not the text.

    Each rank of tensor parallelism has a shard of the tokens and all heads for it, so that no token has to move: the
    layers before and after the attention, a seventh of an expert's weights, are whole on every rank. The ranks make
    keys and values together, and each keeps all of them.

    Args:
        kernel: computes the attention itself.
        group: the ranks of tensor parallelism; None for one rank.
        cache: tells the bias of the texts in the present pass.
    """

    def __init__(self, kernel: Kernel, group: Any | None, cache: TextCache) -> None:
        self.kernel = kernel
        self.group = group
        self.cache = cache

    def keys_values(self, attn: WanAttention, text: torch.Tensor) -> torch.Tensor:
        """Return keys and values of a text `[batch, tokens, dim]`, `[2, batch, tokens, heads, features]`."""
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
        """Return what the tokens take from the text, of the shape of `hidden_states`, `[batch, tokens, width]`.

        `encoder_hidden_states` is what `keys_values` returned.
        """
        query = attn.norm_q(attn.to_q(hidden_states))
        key, value = encoder_hidden_states.unbind()
        hidden_states = self.kernel(query.unflatten(2, key.shape[2:]), key, value, self.cache.bias)
        attended: torch.Tensor = attn.to_out[0](hidden_states.flatten(2, 3).type_as(query))
        return attended


def _normalised(group: Any | None, *parts: tuple[nn.Module, torch.Tensor]) -> list[torch.Tensor]:
    """Return each tensor, normalised by its norm."""
    if group is None:
        return [norm(hidden) for norm, hidden in parts]
    own = torch.cat([norm.squares(hidden) for norm, hidden in parts], dim=1)  # type: ignore[operator]
    squares = _of_all_ranks(own, group, *parts)
    return [norm(hidden, one) for (norm, hidden), one in zip(parts, squares, strict=True)]


def _fused(
    group: Any | None, rotary_emb: tuple[torch.Tensor, torch.Tensor], *parts: tuple[nn.Module, torch.Tensor]
) -> list[torch.Tensor]:
    """Return each tensor normalised and rotated, `[batch, tokens, heads, features]`, in one kernel each."""
    squares: Sequence[torch.Tensor | None] = [None] * len(parts)
    if group is not None:
        squares = _of_all_ranks(square_sums([hidden for _, hidden in parts]), group, *parts)
    return [norm_rotate(hidden, norm, one, *rotary_emb) for (norm, hidden), one in zip(parts, squares, strict=True)]


def _of_all_ranks(squares: torch.Tensor, group: Any, *parts: tuple[nn.Module, torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return each tensor's sums of squares over the features of all ranks.

    One all-reduce serves all tensors: one for each would double the latency, which on a slow link is all there is to
    such a small message. `squares` are over this rank's features, one tensor's tokens behind the other's; changed.
    """
    add_up(squares, group)
    return squares.split([hidden.shape[1] for _, hidden in parts], dim=1)


def _rotate(hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighbouring features of `[batch, tokens, heads, features]` (rotary position embedding)."""
    even, odd = hidden[..., 0::2], hidden[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(hidden)
