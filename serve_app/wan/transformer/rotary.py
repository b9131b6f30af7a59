"""The rotary position embedding, kept from step to step while the size of the latents stays."""

from __future__ import annotations

import torch
from torch import nn

from serve_app.wan.parallel.sequence_shard import SequenceShard


class Rotary(nn.Module):
    """A cache of the last result, in place of diffusers' `WanRotaryPosEmbed`.

    Args:
        rope: computes `(cos, sin)`, each `[1, tokens, 1, features]`, from the size of latents `[batch, channels,
            frames, height, width]`.
        shard: this rank's sequence shard; None where each rank has all tokens.
    """

    def __init__(self, rope: nn.Module, shard: SequenceShard | None) -> None:
        super().__init__()
        self.rope = rope
        self._shard = shard
        self._size: torch.Size | None = None
        self._kept: tuple[torch.Tensor, ...] | None = None

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return `(cos, sin)` of this rank's tokens, as a block takes them.

        Where ranks divide the tokens, an empty tensor `[tokens of all ranks, 0]` comes third. It tells the number of
        tokens: a compiled block takes sizes from tensors, but is compiled anew when a number changes.
        """
        size = latents.shape[2:]
        if self._kept is None or size != self._size:
            cos, sin = self.rope(latents)
            whole: tuple[torch.Tensor, ...] = ()
            if self._shard is not None:
                whole = (cos.new_empty(cos.shape[1], 0),)
                cos, sin = self._shard.take_own(cos), self._shard.take_own(sin)
            # Copies: given a view, a compiled block would also fix the sizes of the tensor behind it.
            self._size, self._kept = size, (cos.clone(), sin.clone(), *whole)
        return self._kept
