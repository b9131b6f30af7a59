"""Layers whose weights ranks share, with the exchange between them by collectives and by symmetric memory.

    python -m benchmarks.model.tensor_parallel [--ranks 2] [--sizes 832x480 1280x720] [--frames 81] [--parts 1 2 4 8]
                                      [--sees all]

Of the four exchanges in an A14B block, in bfloat16: milliseconds of the product alone, of the exchange alone as a
collective, of one after the other, for sums of parts beside each other, and by symmetric memory. Medians by events on
rank 0. --sees own has each rank see no device but its own, as Ray has it by itself.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import get_args

import torch
import torch.distributed as dist

from benchmarks.machine import describe, timed, tokens_of
from benchmarks.model.parity import Seen, run_ranks
from serve_app.wan.parallel import symmetric_memory
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import init_process_groups
from serve_app.wan.parallel.tensor_parallel import _overlapped, chunks_of, column_parallel

_WIDTH = 5120
_GATHERED = {"query, key, value": 3 * _WIDTH, "feed-forward, first": 13824}
_SUMMED = {"attention's output": _WIDTH, "feed-forward, second": 13824}
"""Output or input features of a layer over all ranks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x720"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8], help="of sums by collectives")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--sees", choices=get_args(Seen), default="all")
    options = parser.parse_args()
    run_ranks(_measure, Mesh(tensor=options.ranks), options, sees=options.sees)


@torch.no_grad()
def _measure(rank: int, mesh: Mesh, port: int, options: argparse.Namespace) -> None:
    device = torch.device("cuda", rank if options.sees == "all" else 0)
    groups = init_process_groups(rank, mesh, "127.0.0.1", port, device, timeout_s=120)
    if rank == 0:
        print(f"\n{describe()}; {torch.cuda.get_device_name(device)}; {mesh.ranks} ranks, which see {options.sees}\n")
        parts = " | ".join(f"{parts} parts" for parts in options.parts)
        print(
            f"| size | layer | product | exchange | one after the other | {parts} | they take | by symmetric memory |"
        )
        print(f"|---|---|---|---|---|{'---|' * len(options.parts)}---|---|")
    for size in options.sizes:
        run = tokens_of(size, options.frames) // mesh.ranks
        for layer, features in (_GATHERED | _SUMMED).items():
            own = torch.randn(1, run, _WIDTH, device=device, dtype=torch.bfloat16)
            ways = (_gathered if layer in _GATHERED else _summed)(
                own, features, mesh.ranks, groups.tensor.group, options
            )
            times = [None if way is None else _milliseconds(way, options.repeats) for way in ways]
            if rank == 0:
                numbers = ["" if one is None else f"{one:.2f}" for one in times]
                takes = "" if layer in _GATHERED else f"{chunks_of(run)}"
                print(f"| {size} | {layer} | {' | '.join([*numbers[:-1], takes, numbers[-1]])} |", flush=True)
    groups.close()


_Ways = list[Callable[[], object] | None]


def _gathered(own: torch.Tensor, features: int, ranks: int, group: object, options: argparse.Namespace) -> _Ways:
    """Measure layers that gather the sequence shards of all ranks."""
    wide = features // ranks
    layer = SimpleNamespace(weight=own.new_empty(wide, _WIDTH).normal_(), bias=own.new_zeros(wide))
    tokens = ranks * own.shape[1]
    whole = own.new_empty(tokens, _WIDTH).normal_()

    def product() -> None:
        torch.addmm(layer.bias, whole, layer.weight.t())

    def exchange() -> None:
        dist.all_gather_into_tensor(whole, own[0], group=group)

    def both() -> None:
        exchange()
        product()

    def beside() -> None:
        column_parallel(own, tokens, group, layer)

    return [product, exchange, both, *[None] * len(options.parts), beside if _peers(group) else None]


def _summed(own: torch.Tensor, features: int, ranks: int, group: object, options: argparse.Namespace) -> _Ways:
    """Measure layers whose products are summed over the ranks."""
    rows = own.new_empty(ranks * own.shape[1], features // ranks).normal_()
    weight = own.new_empty(_WIDTH, features // ranks).normal_()
    whole = rows @ weight.t()
    others = own.new_empty(ranks - 1, *own.shape)

    def product() -> None:
        torch.mm(rows, weight.t(), out=whole)

    def exchange() -> None:
        dist.reduce_scatter_tensor(own[0], whole, group=group)

    def both() -> None:
        product()
        exchange()

    def parts(count: int) -> Callable[[], object]:
        return lambda: _overlapped(rows, weight, ranks, group, count, own[0])

    def beside() -> None:
        peers = _peers(group)
        assert peers is not None
        peers.share_products(rows[None], weight, own, others)

    return [product, exchange, both, *map(parts, options.parts), beside if _peers(group) else None]


def _peers(group: object) -> symmetric_memory.SymmetricMemory | None:
    return symmetric_memory.of(group.group_name)  # type: ignore[attr-defined]


def _milliseconds(run: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats + 2):
        dist.barrier()
        found.append(1e3 * timed(run, torch.device("cuda")))
    return statistics.median(found[2:])


if __name__ == "__main__":
    main()
