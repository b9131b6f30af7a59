"""Pairs of linear layers whose weights ranks share (Megatron-LM, https://arxiv.org/abs/1909.08053), and the tokens
between the pairs (https://arxiv.org/abs/2205.05198).

Outside of a pair each rank has a run of the tokens with all features, so that norms and modulation are nobody's work
twice. All tokens come together before the first layer; after the second one, whose product is on each rank a part of
the sum that all of them want, each gets the sum of its own run. That is as much as an all-reduce sends.

To the compiler both are one operator each, where a collective splits a block in two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from serve_app.wan import exchange

ROWS = 4096
"""Of a part at least, of one rank's run; `python -m benchmarks.row_parallel` compares numbers of parts."""
_MOST_PARTS = 8


class RowParallel(nn.Module):
    """The second layer of a pair: takes the place of DeepSpeed's `LinearAllreduce`, after which each rank has all
    tokens, and whose product is finished before its sum begins. On CUDA the product is made in parts here, and each is
    added up while the next one is made.

    Args:
        linear: with this rank's `weight`, `[features out, own features in]`, and the whole `bias`, which may be None.
        group: of the ranks that have the other parts.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, group: Any) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._group: str = group.group_name
        self._size = dist.get_world_size(group)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of `hidden`, `[batch, tokens, own features in]`: of this rank's run of the tokens,
        `[batch, run, features out]`. The last run may end in rows that stand for no token."""
        total: torch.Tensor = torch.ops.wan_serve.row_parallel(hidden, self.weight, self._size, self._group)
        return total if self.bias is None else total + self.bias


def gather_tokens(hidden: torch.Tensor, tokens: int, group: Any) -> torch.Tensor:
    """What the first layer of a pair takes: of all ranks' runs, `[batch, run, features]`, the first `tokens`."""
    whole: torch.Tensor = torch.ops.wan_serve.gather_tokens(hidden, tokens, group.group_name)
    return whole


@torch.library.custom_op("wan_serve::gather_tokens", mutates_args=())
def _gather_tokens(hidden: torch.Tensor, tokens: int, group_name: str) -> torch.Tensor:
    runs, coming = exchange.stack(hidden, _group(group_name))  # [ranks, batch, run, features]
    if coming is not None:
        coming.wait()
    batch, features = hidden.shape[0], hidden.shape[2]
    if batch == 1:
        return runs.view(-1, features)[:tokens].unsqueeze(0)
    return runs.transpose(0, 1).reshape(batch, -1, features)[:, :tokens].contiguous()


@_gather_tokens.register_fake
def _(hidden: torch.Tensor, tokens: int, group_name: str) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], tokens, hidden.shape[2])


@torch.library.custom_op("wan_serve::row_parallel", mutates_args=())
def _row_parallel(hidden: torch.Tensor, weight: torch.Tensor, ranks: int, group_name: str) -> torch.Tensor:
    group, run = _group(group_name), -(-hidden.shape[1] // ranks)
    total = hidden.new_empty(hidden.shape[0], run, weight.shape[0])
    for rows, sums in zip(hidden, total, strict=True):
        _beside(rows, weight, ranks, group, parts_of(run), sums)
    return total


@_row_parallel.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, ranks: int, group_name: str) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], -(-hidden.shape[1] // ranks), weight.shape[0])


def parts_of(run: int) -> int:
    """How many parts a product is made in of which each rank gets so many rows."""
    return min(_MOST_PARTS, max(1, run // ROWS))


def _beside(rows: torch.Tensor, weight: torch.Tensor, ranks: int, group: Any, parts: int, total: torch.Tensor) -> None:
    """The product, `[tokens, features out]`, summed to `total`, this rank's run of it. On CUDA each part of every run
    is added up on the collectives' own stream while the next one is made."""
    pending, start = [], 0
    for own in total.tensor_split(parts):
        product = rows.new_empty(ranks, len(own), weight.shape[0])
        for rank, to in enumerate(product):
            begin = rank * len(total) + start
            some = rows[begin : begin + len(own)]
            torch.mm(some, weight.t(), out=to[: len(some)])
            to[len(some) :] = 0
        start += len(own)
        pending.append(exchange.sum_up(product, own, group))
    for one in pending:
        if one is not None:
            one.wait()  # the stream waits, not this thread


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type,unused-ignore]
