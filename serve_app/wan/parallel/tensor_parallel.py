"""Pairs of linear layers whose weights ranks share (Megatron-LM, https://arxiv.org/abs/1909.08053), and the tokens
between the pairs (https://arxiv.org/abs/2205.05198).

Outside of a pair each rank has a run of the tokens with all features, so that norms and modulation are nobody's work
twice. All tokens come together before the first layer; after the second one, whose product is on each rank a part of
the sum that all of them want, each gets the sum of its own run. That is as much as an all-reduce sends.

Where the ranks' devices can show each other their memory, tokens and sums come beside the products, piece by piece
(`symmetric_memory`); else by collectives. To the compiler a layer with its exchange is one operator, where a collective
splits a block in two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from serve_app.compat import linear_gelu, process_group
from serve_app.wan.parallel import collectives as exchange
from serve_app.wan.parallel import symmetric_memory as symmetric_memory

ROWS = 4096
"""Of a part at least, of one rank's run; `python -m benchmarks.model.tensor_parallel` compares numbers of parts."""
_MOST_PARTS = 4


class RowParallel(nn.Module):
    """The second layer of a pair: takes the place of DeepSpeed's `LinearAllreduce`, after which each rank has all
    tokens, and whose product is finished before its sum begins. On CUDA parts of the product are made here while others
    are on their way.

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
        total, others = torch.ops.wan_serve.row_parallel(hidden, self.weight, self._size, self._group)
        for part in others.unbind():  # which what is compiled adds up with all that follows
            total = total + part
        return total if self.bias is None else total + self.bias


class ColumnParallel(nn.Module):
    """The first layer of a pair.

    Args:
        linear: with this rank's `weight`, `[own features out, features in]`, and `bias`.
        group: of the ranks that have the other parts.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, linear: nn.Linear, group: Any) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._group = group
        self._size = dist.get_world_size(group)

    def forward(self, hidden: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """Of all ranks' runs of the tokens, `[batch, run, features in]`, as `column_parallel` does it; `[batch, tokens,
        own features out]`. Those of the last run may end in rows that stand for no token."""
        (product,) = column_parallel(hidden, hidden.shape[1] * self._size, self._group, self, gelu=gelu)
        return product


def column_parallel(
    hidden: torch.Tensor, tokens: int, group: Any, *layers: Any, gelu: bool = False
) -> list[torch.Tensor]:
    """First layers of a pair that take the same: of all ranks' runs, `[batch, run, features]`, the first `tokens`.

    Args:
        layers: each with a `weight`, `[own features out, features in]`, and a `bias`.
        gelu: have products write what GELU makes of them, in its tanh approximation. On CUDA alone.

    Returns:
        Of each layer `[batch, tokens, own features out]`.
    """
    weights, biases = ([getattr(layer, name) for layer in layers] for name in ("weight", "bias"))
    products: list[torch.Tensor] = torch.ops.wan_serve.column_parallel(
        hidden, weights, biases, gelu, tokens, group.group_name
    )
    return products


@torch.library.custom_op("wan_serve::column_parallel", mutates_args=())
def _column_parallel(
    hidden: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    gelu: bool,
    tokens: int,
    group_name: str,
) -> list[torch.Tensor]:
    batch, run, _ = hidden.shape
    products = [hidden.new_empty(batch, tokens, len(weight)) for weight in weights]

    def use(rank: int, rows: torch.Tensor) -> None:
        begin = rank * run
        for weight, bias, product in zip(weights, biases, products, strict=True):
            for some, to in zip(rows, product[:, begin : begin + rows.shape[1]], strict=True):
                _linear(some[: len(to)], weight, bias, gelu, to)

    peers = symmetric_memory.of(group_name)
    if peers is not None:
        peers.gather(hidden, use)
        return products
    runs, coming = exchange.stack(hidden, process_group(group_name))  # [ranks, batch, run, features]
    if coming is not None:
        coming.wait()
    use(0, runs.transpose(0, 1).flatten(1, 2))
    return products


@_column_parallel.register_fake
def _(hidden: torch.Tensor, weights: list[torch.Tensor], *others: Any) -> list[torch.Tensor]:
    return [hidden.new_empty(hidden.shape[0], others[2], weight.shape[0]) for weight in weights]


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool, out: torch.Tensor) -> None:
    if gelu:
        linear_gelu(rows, weight, bias, out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


@torch.library.custom_op("wan_serve::row_parallel", mutates_args=())
def _row_parallel(
    hidden: torch.Tensor, weight: torch.Tensor, ranks: int, group_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, `[batch, run, features out]`, and parts that it still lacks, `[parts, batch, run, features out]`."""
    total, others = _of_run(hidden, weight, ranks, group_name)
    peers = symmetric_memory.of(group_name)
    if peers is not None:
        peers.share_products(hidden, weight, total, others)
        return total, others
    group, parts = process_group(group_name), parts_of(total.shape[1])
    for rows, sums in zip(hidden, total, strict=True):
        _beside(rows, weight, ranks, group, parts, sums)
    return total, others


@_row_parallel.register_fake
def _of_run(
    hidden: torch.Tensor, weight: torch.Tensor, ranks: int, group_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for it."""
    shape = (hidden.shape[0], -(-hidden.shape[1] // ranks), weight.shape[0])
    parts = 0 if symmetric_memory.of(group_name) is None else ranks - 1
    return hidden.new_empty(shape), hidden.new_empty(parts, *shape)


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
