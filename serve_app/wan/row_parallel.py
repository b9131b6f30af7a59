"""The second linear layer of a pair whose weights ranks share (Megatron-LM, https://arxiv.org/abs/1909.08053).

Each rank has some of the input's features, so its product is a part of the sum that all of them want.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from serve_app.wan.exchange import add_up

ROWS = 8192
"""Of a part at least; `python -m benchmarks.row_parallel` compares numbers of parts."""
_MOST_PARTS = 8


class RowParallel(nn.Module):
    """Takes the place of DeepSpeed's `LinearAllreduce`, whose product is finished before its sum begins.

    On CUDA the product is made in parts, and each is added up while the next one is made. To the compiler it is one
    operator, where DeepSpeed's splits a block in two.

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

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, `[..., features out]`, of `hidden`, `[..., own features in]`."""
        total: torch.Tensor = torch.ops.wan_serve.row_parallel(hidden, self.weight, self._group)
        return total if self.bias is None else total + self.bias


@torch.library.custom_op("wan_serve::row_parallel", mutates_args=())
def _row_parallel(hidden: torch.Tensor, weight: torch.Tensor, group_name: str) -> torch.Tensor:
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type,unused-ignore]
    if hidden.device.type != "cuda":
        product = torch.matmul(hidden, weight.t())
        add_up(product, group)
        return product
    rows = hidden.reshape(-1, hidden.shape[-1])
    return _beside(rows, weight, group, parts_of(len(rows))).view(*hidden.shape[:-1], -1)


@_row_parallel.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, group_name: str) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0])


def parts_of(rows: int) -> int:
    """How many parts a product of so many rows is made in."""
    return min(_MOST_PARTS, max(1, rows // ROWS))


def _beside(rows: torch.Tensor, weight: torch.Tensor, group: Any, parts: int) -> torch.Tensor:
    """The product, each part of it added up on the collectives' own stream while the next one is made."""
    total = rows.new_empty(len(rows), weight.shape[0])
    sums = []
    for some, product in zip(rows.tensor_split(parts), total.tensor_split(parts), strict=True):
        torch.mm(some, weight.t(), out=product)
        sums.append(dist.all_reduce(product, group=group, async_op=True))
    for one in sums:
        one.wait()  # the stream waits, not this thread
    return total
