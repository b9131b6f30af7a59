"""Sums over the ranks of one machine without GPUs: each part sent to each rank, against gloo's all-reduce.

    python -m benchmarks.model.collectives [--ranks 2 4] [--kib 1 32 256 2048 16384] [--rounds 6]

One thread a rank; both ways in turns, microseconds in the median of the rounds, ours at any size. A pass of the tiny
model is 25 sums.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.machine import describe
from benchmarks.model.parity import run_ranks
from serve_app.wan.parallel import collectives as exchange
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import init_process_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--kib", type=int, nargs="+", default=[1, 32, 256, 2048, 16384])
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    print(
        f"{describe()}, float32\n\n| ranks | KiB | all-reduce µs | ours µs | ours / all-reduce |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "rows.json"
        for ranks in options.ranks:
            run_ranks(_measure, Mesh(tensor=ranks), options.kib, options.rounds, output)
            for kib, theirs, ours in json.loads(output.read_text()):
                print(f"| {ranks} | {kib} | {theirs:.0f} | {ours:.0f} | {ours / theirs:.2f} |", flush=True)


def _measure(rank: int, mesh: Mesh, port: int, sizes: list[int], rounds: int, output: Path) -> None:
    torch.set_num_threads(1)
    exchange._MOST_BYTES = 2**40  # what it is chosen by is what this measures
    groups = init_process_groups(rank, mesh, "127.0.0.1", port, torch.device("cpu"), timeout_s=120)
    group, rows = groups.tensor.group, []
    ways: tuple[Callable[[torch.Tensor], object], ...] = (
        lambda part: dist.all_reduce(part, group=group),
        lambda part: exchange.add_up(part, group),
    )
    for kib in sizes:
        part, count = torch.zeros(kib * 256), 200 if kib < 2048 else 20
        seconds: list[list[float]] = [[], []]
        for _ in range(rounds):
            for way, taken in zip(ways, seconds, strict=True):
                for _ in range(5):
                    way(part)
                started = time.perf_counter()
                for _ in range(count):
                    way(part)
                taken.append((time.perf_counter() - started) / count)
        rows.append([kib, *(1e6 * statistics.median(taken) for taken in seconds)])
    if rank == 0:
        output.write_text(json.dumps(rows))
    groups.close()


if __name__ == "__main__":
    main()
