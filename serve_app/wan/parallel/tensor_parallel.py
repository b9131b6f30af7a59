"""Tensor parallelism: pairs of linear layers whose weights are divided among ranks.

The weights are divided as in Megatron-LM (https://arxiv.org/abs/1909.08053), the tokens between the pairs as in
https://arxiv.org/abs/2205.05198: outside of a pair each rank has a shard of the tokens, here a run of them, with all
features, so that no rank repeats another's norms and modulation. All tokens are gathered before the first layer. The
product of the second layer is on each rank a part of a sum; each rank gets the sum for its own run. That sends as much
as an all-reduce.

Where the devices have symmetric memory, tokens and sums are copied beside the products, part by part
(`symmetric_memory`); else by collectives. A layer with its communication is one operator to the compiler; a collective
would split a block in two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from serve_app.compat.model import linear_gelu, process_group
from serve_app.wan.parallel import collectives, symmetric_memory

ROWS = 4096
"""Least number of rows of a rank's run in a chunk; `python -m benchmarks.model.tensor_parallel` compares numbers."""
_MOST_CHUNKS = 4


class RowParallel(nn.Module):
    """The second layer of a pair, in place of DeepSpeed's `LinearAllreduce`.

    DeepSpeed's finishes the product before its sum begins, and leaves all tokens on every rank. On CUDA this one
    computes chunks of the product while others are on their way.

    Args:
        linear: with this rank's `weight`, `[features out, own features in]`, and the whole `bias`, which may be None.
        group: the ranks with the other slices of the weight.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, group: Any) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._group: str = group.group_name
        self._size = dist.get_world_size(group)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the product, summed over all ranks, for this rank's run of the tokens, `[batch, run, features out]`.

        `hidden` is `[batch, tokens, own features in]`. The last run may end in rows that stand for no token.
        """
        total, others = torch.ops.wan_serve.row_parallel(hidden, self.weight, self._size, self._group)
        for part in others.unbind():  # the compiler fuses these sums with what follows
            total = total + part
        return total if self.bias is None else total + self.bias


class ColumnParallel(nn.Module):
    """The first layer of a pair.

    Args:
        linear: with this rank's `weight`, `[own features out, features in]`, and `bias`.
        group: the ranks with the other slices of the weight.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, linear: nn.Linear, group: Any) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._group = group
        self._size = dist.get_world_size(group)

    def forward(self, hidden: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """Return the product for all ranks' runs of the tokens, `[batch, tokens, own features out]`.

        `hidden` is this rank's run, `[batch, run, features in]`. The last rows may stand for no token.
        """
        (product,) = column_parallel(hidden, hidden.shape[1] * self._size, self._group, self, gelu=gelu)
        return product


def column_parallel(
    hidden: torch.Tensor, tokens: int, group: Any, *layers: Any, gelu: bool = False
) -> list[torch.Tensor]:
    """Gather the tokens of all ranks and run first layers of pairs, which take the same input.

    Args:
        hidden: this rank's run, `[batch, run, features in]`.
        tokens: number of tokens of all runs that count; rows after them stand for no token.
        group: the ranks.
        *layers: each with a `weight`, `[own features out, features in]`, and a `bias`.
        gelu: apply GELU, in its tanh approximation, within the product. On CUDA alone.

    Returns:
        The product of each layer, `[batch, tokens, own features out]`.
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
    runs, coming = collectives.stack(hidden, process_group(group_name))  # [ranks, batch, run, features]
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
    """Return the sum, `[batch, run, features out]`, and parts to add to it, `[parts, batch, run, features out]`."""
    total, others = _allocate_sums(hidden, weight, ranks, group_name)
    peers = symmetric_memory.of(group_name)
    if peers is not None:
        peers.share_products(hidden, weight, total, others)
        return total, others
    group, chunks = process_group(group_name), chunks_of(total.shape[1])
    for rows, sums in zip(hidden, total, strict=True):
        _overlapped(rows, weight, ranks, group, chunks, sums)
    return total, others


@_row_parallel.register_fake
def _allocate_sums(
    hidden: torch.Tensor, weight: torch.Tensor, ranks: int, group_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate what `_row_parallel` returns."""
    shape = (hidden.shape[0], -(-hidden.shape[1] // ranks), weight.shape[0])
    parts = 0 if symmetric_memory.of(group_name) is None else ranks - 1
    return hidden.new_empty(shape), hidden.new_empty(parts, *shape)


def chunks_of(run: int) -> int:
    """Return the number of chunks a product is split into, so that communication overlaps it.

    `run` is the number of rows that each rank gets.
    """
    return min(_MOST_CHUNKS, max(1, run // ROWS))


def _overlapped(
    rows: torch.Tensor, weight: torch.Tensor, ranks: int, group: Any, chunks: int, total: torch.Tensor
) -> None:
    """Compute the product, `[tokens, features out]`, and put its sum for this rank's run into `total`.

    On CUDA each chunk is summed on the collectives' own stream while the next one is computed.
    """
    pending, start = [], 0
    for own in total.tensor_split(chunks):
        product = rows.new_empty(ranks, len(own), weight.shape[0])
        for rank, to in enumerate(product):
            begin = rank * len(total) + start
            some = rows[begin : begin + len(own)]
            torch.mm(some, weight.t(), out=to[: len(some)])
            to[len(some) :] = 0
        start += len(own)
        pending.append(collectives.sum_up(product, own, group))
    for one in pending:
        if one is not None:
            one.wait()  # the stream waits, not this thread
