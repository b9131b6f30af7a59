"""Attention over this rank's heads, with a query/key norm that spans the heads of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from serve_app.wan.sequence import Tokens
from serve_app.wan.text_memory import TextMemory


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


class Attention:
    """The counterpart of diffusers' `WanAttnProcessor`, without image tokens.

    Args:
        group: of the ranks that share the heads; None for one rank.
        memory: of the text's keys and values, for cross-attention.
        layer: index of the block.
        tokens: those that ranks share, for self-attention; None where each has all.
    """

    _attention_backend = None  # set by diffusers' `set_attention_backend`
    _parallel_config = None

    def __init__(
        self, group: Any | None, memory: TextMemory | None = None, layer: int = 0, tokens: Tokens | None = None
    ) -> None:
        self.group = group
        self.memory = memory
        self.layer = layer
        self.tokens = tokens

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        query = attn.to_q(hidden_states)
        known = None if self.memory is None else self.memory.get(self.layer)
        if known is not None:
            (query,) = self._normalised((attn.norm_q, query))
            key, value = known
        else:
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key = self._normalised((attn.norm_q, query), (attn.norm_k, attn.to_k(context)))
            key, value = (one.unflatten(2, (attn.heads, -1)) for one in (key, attn.to_v(context)))
            if self.memory is not None:
                self.memory.put(self.layer, (key, value))
        query = query.unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        if self.tokens is not None:
            query, key, value = self.tokens.to_heads(query, key, value)
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask if self.memory is None else self.memory.bias,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
        )
        if self.tokens is not None:
            hidden_states = self.tokens.to_tokens(hidden_states)
        output: torch.Tensor = attn.to_out[0](hidden_states.flatten(2, 3).type_as(query))
        return output

    def _normalised(self, *parts: tuple[nn.Module, torch.Tensor]) -> list[torch.Tensor]:
        """Each tensor through its norm. Those over several ranks share one all-reduce: a separate one each would double
        the latency, which on a slow link is all there is to such a small message."""
        if self.group is None:
            return [norm(hidden) for norm, hidden in parts]
        from deepspeed import comm

        squares = torch.cat([norm.squares(hidden) for norm, hidden in parts], dim=1)  # type: ignore[operator]
        comm.inference_all_reduce(squares, group=self.group)
        by_part = squares.split([hidden.shape[1] for _, hidden in parts], dim=1)
        return [norm(hidden, of_part) for (norm, hidden), of_part in zip(parts, by_part, strict=True)]


def _rotate(hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of `[batch, tokens, heads, features]`, pairs being neighbours."""
    even, odd = hidden[..., 0::2], hidden[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(hidden)
