"""Collectives: gathers and sums of the ranks' parts.

On CUDA by NCCL. On CPUs each rank sends its part to each other rank: gloo's own all-reduce takes several rounds,
each as long as that for small parts, and small parts are what the ranks of a small model wait for
(`python -m benchmarks.model.collectives`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist

_MOST_BYTES = 2**20
"""Size of a part above which an all-reduce, in which each rank sends less, is as fast or faster."""


def gather(part: torch.Tensor, group: Any) -> list[torch.Tensor]:
    """Return the parts of all ranks, in their order; all are of one shape and dtype."""
    part = part.contiguous()
    if not _by_hand(part):
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part, group=group)
        return parts
    me = dist.get_rank()
    parts = [part if rank == me else torch.empty_like(part) for rank in _ranks(group)]
    others = [(rank, one) for rank, one in zip(_ranks(group), parts, strict=True) if rank != me]
    sent = [dist.isend(part, rank, group) for rank, _ in others]
    came = [dist.irecv(one, rank, group) for rank, one in others]
    for work in (*came, *sent):
        if work is not None:  # None for a rank outside of the group
            work.wait()
    return parts


def stack(part: torch.Tensor, group: Any) -> tuple[torch.Tensor, Any | None]:
    """Gather into one tensor, `[ranks, ...]`; returns it and, on CUDA, the work to `wait` for before using it."""
    if _by_hand(part):
        return torch.stack(gather(part, group)), None
    parts = part.new_empty(dist.get_world_size(group), *part.shape)
    return parts, dist.all_gather_into_tensor(parts, part.contiguous(), group=group, async_op=True)


def sum_up(parts: torch.Tensor, total: torch.Tensor, group: Any) -> Any | None:
    """Put into `total` the sum of the parts that all ranks have for this one (a reduce-scatter).

    Args:
        parts: one part for each rank, `[ranks, ...]`.
        total: of the shape of a part.
        group: the ranks.

    Returns:
        On CUDA the work to `wait` for before `total` is used; None where the sum is complete.
    """
    if not _by_hand(parts):
        return dist.reduce_scatter_tensor(total, parts, group=group, async_op=True)
    me, ranks = dist.get_rank(), _ranks(group)
    came = [one if rank == me else torch.empty_like(total) for rank, one in zip(ranks, parts, strict=True)]
    works = [dist.isend(one, rank, group) for rank, one in zip(ranks, parts, strict=True) if rank != me]
    works += [dist.irecv(one, rank, group) for rank, one in zip(ranks, came, strict=True) if rank != me]
    for work in works:
        if work is not None:
            work.wait()
    total.copy_(came[0])
    for one in came[1:]:
        total += one
    return None


def add_up(part: torch.Tensor, group: Any) -> None:
    """Replace `part` by the sum of all ranks' parts (an all-reduce), the same to the bit on every rank.

    Raises:
        RuntimeError: a rank is gone, or did not answer within the group's time limit.
    """
    if not _by_hand(part) or not part.is_contiguous() or part.nbytes > _MOST_BYTES:
        dist.all_reduce(part, group=group)
        return
    parts = gather(part, group)
    if len(parts) == 2:  # the order of two does not matter
        part += next(one for one in parts if one is not part)
        return
    total, *others = parts
    for other in others:
        total += other
    if total is not part:
        part.copy_(total)


def _by_hand(part: torch.Tensor) -> bool:
    # A compiled graph can hold collectives, but no sends.
    return part.device.type == "cpu" and not torch.compiler.is_compiling()


@functools.cache
def _ranks(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)
