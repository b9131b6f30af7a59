"""Sequence shards: tokens of a sample divided among ranks, by DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509).

Every rank has a shard of the tokens with all heads. For self-attention ranks exchange, so that each has all tokens of
some heads. DeepSpeed's own layer sends query, key and value one by one, and wants a number of tokens that the number of
ranks divides. Here they travel together, and any number will do: the last shard is padded, and the padding is cut off
where all tokens are together, so that no mask is needed.

Ranks of tensor parallelism have shards as well, between their layers (`tensor_parallel`), but gather the tokens.
"""

from __future__ import annotations

import torch

from serve_app.wan.parallel.process_groups import Axis


class SequenceShard:
    """This rank's shard of a model's tokens.

    Args:
        axis: the ranks that divide the tokens.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def take_own(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard, `[batch, run, ...]`, of `[batch, tokens, ...]`; the last one may end in zeros."""
        run = -(-whole.shape[1] // self._axis.size)
        part = whole[:, self._axis.index * run : (self._axis.index + 1) * run]
        if part.shape[1] < run:
            return torch.cat([part, part.new_zeros(part.shape[0], run - part.shape[1], *part.shape[2:])], dim=1)
        # A copy: a compiled block would be compiled anew for a view that begins elsewhere.
        return part.clone(memory_format=torch.contiguous_format)

    def gather_all(self, own: torch.Tensor, tokens: int) -> torch.Tensor:
        """Bring the shards of all ranks, `[batch, run, ...]` each, together: `[batch, tokens, ...]` on every rank."""
        return torch.cat(self._axis.gather(own), dim=1)[:, :tokens]

    def to_heads(self, tokens: int, *parts: torch.Tensor) -> list[torch.Tensor]:
        """Exchange `[batch, own tokens, heads, features]` for `[batch, all tokens, own heads, features]`."""
        size = self._axis.size
        stacked = torch.stack(parts).unflatten(3, (size, -1))  # [parts, batch, run, size, own heads, features]
        came = self._exchange(stacked.permute(3, 0, 1, 2, 4, 5))  # [size, parts, batch, run, own heads, features]
        whole = came.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)[:, :, :tokens]
        return list(whole.unbind())

    def to_tokens(self, run: int, hidden: torch.Tensor) -> torch.Tensor:
        """Exchange `[batch, all tokens, own heads, features]` for `[batch, own tokens, heads, features]`."""
        size = self._axis.size
        missing = size * run - hidden.shape[1]
        if missing:
            hidden = torch.cat([hidden, hidden.new_zeros(hidden.shape[0], missing, *hidden.shape[2:])], dim=1)
        runs = hidden.unflatten(1, (size, run))  # [batch, size, run, own heads, features]
        came = self._exchange(runs.transpose(0, 1))  # [size, batch, run, own heads, features]
        return came.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """Send each rank its part of `[size, ...]`; return the parts that the ranks sent to this one."""
        parts = parts.contiguous()
        came = torch.empty_like(parts)
        torch.distributed.all_to_all_single(came, parts, group=self._axis.group)
        return came
