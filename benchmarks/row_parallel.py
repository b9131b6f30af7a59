"""A product whose parts ranks add up: one after the other as DeepSpeed does it, and in parts beside each other.

    python -m benchmarks.row_parallel [--ranks 2] [--sizes 832x480 1280x720] [--frames 81] [--parts 1 2 4 8 16]

Of the two shapes in an A14B block, attention's output and the feed-forward's second layer, in bfloat16: milliseconds
of the product alone, of the sum alone, which leaves each rank the rows of its run, and of both; and of bringing all
rows together again. Medians by events on rank 0.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks.machine import describe, timed, tokens_of
from benchmarks.parity import run_ranks
from serve_app.wan.mesh import Mesh
from serve_app.wan.row_parallel import _beside, gather_tokens, parts_of
from serve_app.wan.world import init_world

_WIDTH = 5120
_INSIDE = {"attention's output": 5120, "feed-forward": 13824}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x720"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    run_ranks(_measure, Mesh(tensor=options.ranks), options)


@torch.no_grad()
def _measure(rank: int, mesh: Mesh, port: int, options: argparse.Namespace) -> None:
    device = torch.device("cuda", rank)
    world = init_world(rank, mesh, "127.0.0.1", port, device, timeout_s=120)
    group = world.tensor.group
    if rank == 0:
        print(f"\n{describe()}; {torch.cuda.get_device_name(device)}; {mesh.ranks} ranks\n")
        parts = " | ".join(f"{parts} parts" for parts in options.parts)
        print(f"| size | layer | product ms | sum ms | one after the other | {parts} | the ranks take | together ms |")
        print(f"|---|---|---|---|---|{'---|' * len(options.parts)}---|---|")
    for size in options.sizes:
        tokens = tokens_of(size, options.frames)
        for layer, inside in _INSIDE.items():
            rows = torch.randn(tokens, inside // mesh.ranks, device=device, dtype=torch.bfloat16)
            weight = torch.randn(_WIDTH, inside // mesh.ranks, device=device, dtype=torch.bfloat16)
            run = tokens // mesh.ranks
            product, own = rows @ weight.t(), rows.new_empty(run, _WIDTH)

            def both() -> None:
                dist.reduce_scatter_tensor(own, (rows @ weight.t())[: run * mesh.ranks], group=group)  # noqa: B023

            ways: list[Callable[[], object]] = [
                lambda: rows @ weight.t(),  # noqa: B023
                lambda: dist.reduce_scatter_tensor(own, product[: run * mesh.ranks], group=group),  # noqa: B023
                both,
                *(
                    lambda n=n: _beside(rows, weight, mesh.ranks, group, n, own)  # type: ignore[misc]  # noqa: B023
                    for n in options.parts
                ),
                lambda: gather_tokens(own[None], run * mesh.ranks, group),  # noqa: B023
            ]
            times = [_milliseconds(way, options.repeats) for way in ways]
            if rank == 0:
                numbers = " | ".join(f"{one:.2f}" for one in times[:-1])
                print(f"| {size} | {layer} | {numbers} | {parts_of(run)} | {times[-1]:.2f} |", flush=True)
    world.close()


def _milliseconds(run: Callable[[], object], repeats: int) -> float:
    found = []
    for _ in range(repeats + 2):
        dist.barrier()
        found.append(1e3 * timed(run, torch.device("cuda")))
    return statistics.median(found[2:])


if __name__ == "__main__":
    main()
