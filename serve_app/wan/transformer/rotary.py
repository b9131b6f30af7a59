"""The rotary position embedding of one size, kept from step to step."""

from __future__ import annotations

import torch
from torch import nn

from serve_app.wan.parallel.sequence_shard import SequenceShard


class Rotary(nn.Module):
    """Stands in for diffusers' `WanRotaryPosEmbed`.

    Args:
        rope: makes it, `(cos, sin)`, each `[1, tokens, 1, features]`, from latents `[batch, channels, frames, height,
            width]`, of which it reads the size alone.
        tokens: those that ranks share; None where each has all.
    """

    def __init__(self, rope: nn.Module, tokens: SequenceShard | None) -> None:
        super().__init__()
        self.rope = rope
        self._tokens = tokens
        self._size: torch.Size | None = None
        self._kept: tuple[torch.Tensor, ...] | None = None

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For a block: `(cos, sin)` of this rank's tokens; where ranks share them also a tensor `[tokens, 0]` of all,
        since what is compiled takes sizes from tensors, and for a number is compiled anew when it changes."""
        size = latents.shape[2:]
        if self._kept is None or size != self._size:
            cos, sin = self.rope(latents)
            whole: tuple[torch.Tensor, ...] = ()
            if self._tokens is not None:
                whole = (cos.new_empty(cos.shape[1], 0),)
                cos, sin = self._tokens.take_own(cos), self._tokens.take_own(sin)
            # Copies: of a view, what is compiled would also fix the sizes of what it is a view of.
            self._size, self._kept = size, (cos.clone(), sin.clone(), *whole)
        return self._kept
