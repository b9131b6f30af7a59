"""Ways for a rank to get its shard: from a sharded checkpoint, by slices, or whole by `from_pretrained`.

    python -m benchmarks.model.loading [--layers 3 --heads 16 --ffn 8192] [--ranks 1 2] [--device cpu]

writes a random expert of A14B's shape with fewer layers, heads and a narrower feed-forward (`--layers 40 --heads 40
--ffn 13824` is all of it: 57 GB, and half of that for each entry of `--ranks`), loads it in fresh processes, and prints
a markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.model.parity import run_ranks
from benchmarks.usage import measured
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import init_process_groups
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import Checkpoint, Expert
from serve_app.wan.weights.sharded import ShardedCheckpoint
from serve_app.wan.weights.writer import prepare

EXPERT: Expert = "transformer"
WAYS = ("from_pretrained", "slices", "sharded")
_MB = 1e6


def write_random(folder: Path, layers: int, heads: int, ffn: int, device: str = "cpu") -> Path:
    """Write a checkpoint whose first expert has A14B's dimensions but these, in float32, in files of at most 10 GB."""
    from diffusers import WanTransformer3DModel

    from tests.support.random_checkpoint import write

    write(folder)
    for file in (folder / EXPERT).iterdir():
        file.unlink()
    torch.manual_seed(0)
    with torch.device(device):  # where numbers are drawn faster
        model = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=128,
            text_dim=4096,
            freq_dim=256,
            ffn_dim=ffn,
            num_layers=layers,
        )
    model.save_pretrained(folder / EXPERT, max_shard_size="10GB")
    return folder


def load(way: str, folder: Path, shards: Path, size: int, dtype: str, device: str = "cpu") -> list[dict[str, Any]]:
    """Load the expert on `size` ranks, in one of the `WAYS`, three times.

    The first is in a fresh process with the files out of the page cache, the second with them out of it again, and
    the third from it.

    `from_pretrained` has the machine to itself: it knows of no ranks, and of several at once each would count only
    those pages of the memory map that no other one had brought in before.

    Returns:
        For each rank the first load's `Usage` as a dictionary, its `shard` in bytes, and of the others the seconds
        `cold` and `warm` and those of the processor, `cold_cpu` and `warm_cpu`: what is imported at the first load is
        in neither.
    """
    size = 1 if way == "from_pretrained" else size
    with tempfile.TemporaryDirectory() as name:
        _forget(folder / EXPERT, shards)
        run_ranks(_load, Mesh(tensor=size), way, folder, shards, dtype, device, Path(name), timeout_s=3600)
        return [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(size)]


def _load(
    rank: int, mesh: Mesh, port: int, way: str, folder: Path, shards: Path, dtype: str, where: str, output: Path
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // mesh.ranks))
    device = torch.device(where, rank) if where == "cuda" else torch.device(where)
    if where == "cuda":
        torch.cuda.set_device(device)
    torch.ones(1, device=device)  # the GPU's context is none of the load
    groups = init_process_groups(rank, mesh, "127.0.0.1", port, device, timeout_s=600)

    def once() -> int:
        """Load once, free it, and return the bytes of its parameters."""
        if way == "from_pretrained":
            from diffusers import WanTransformer3DModel

            model: Any = WanTransformer3DModel.from_pretrained(folder / EXPERT, dtype=getattr(torch, dtype))
            model = model.to(device)
        else:
            checkpoint = Checkpoint(folder)
            sharded = ShardedCheckpoint(shards, checkpoint, mesh.tensor, dtype) if way == "sharded" else None
            model = load_expert(checkpoint, EXPERT, groups, getattr(torch, dtype), device, sharded=sharded)
        if where == "cuda":
            torch.cuda.synchronize()
        return sum(p.nbytes for p in model.parameters())

    def together() -> None:
        if mesh.ranks > 1:
            torch.distributed.barrier()

    with measured() as first:
        shard = once()
    together()
    if rank == 0:
        _forget(folder / EXPERT, shards)
    together()
    with measured() as cold:
        once()
    together()
    with measured() as warm:
        once()
    times = {"cold": cold.seconds, "cold_cpu": cold.cpu, "warm": warm.seconds, "warm_cpu": warm.cpu}
    (output / f"{rank}.json").write_text(json.dumps({**asdict(first), "shard": shard, **times}))
    groups.close()


def _forget(*folders: Path) -> None:
    """Let the kernel drop the files' pages, so that the next reader gets them from the disk."""
    for folder in folders:
        for path in folder.rglob("*.safetensors"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go meanwhile; a temporary folder if not given")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would print that it found nothing else
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = write_random(Path(name, "model"), options.layers, options.heads, options.ffn, options.device)
        whole = sum(file.stat().st_size for file in (folder / EXPERT).glob("*.safetensors"))
        print(f"\n{describe()}; {options.device}, {options.dtype}, median of {options.rounds} rounds, alternated")
        print(f"Expert of {whole / _MB:.0f} MB on disk; of each group the worst rank. MB are 10^6 bytes.\n")
        print(
            "| ranks | by | from the disk s | CPU s | from the page cache s | CPU s "
            "| read by calls MB | from the disk MB | peak growth MB | parameters MB |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
        wrote = []
        for size in options.ranks:
            shards = Path(name, f"shards-{size}")
            with measured() as writing:
                done = prepare(Checkpoint(folder), shards, size, options.dtype, experts=(EXPERT,))
            wrote.append(f"{size}: {writing.seconds:.1f} s, {done.bytes / _MB:.0f} MB, {writing.growth / _MB:.0f} MB")
            rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way in WAYS:
                    ranks = load(way, folder, shards, size, options.dtype, options.device)
                    rounds[way].append({key: max(rank[key] for rank in ranks) for key in ranks[0]})
            for way, results in rounds.items():
                m = {key: statistics.median(result[key] for result in results) for key in results[0]}
                label = f"{way} alone" if way == "from_pretrained" else way
                seconds = " | ".join(f"{m[key]:.2f}" for key in ("cold", "cold_cpu", "warm", "warm_cpu"))
                mb = " | ".join(f"{m[key] / _MB:.0f}" for key in ("read", "faulted", "growth", "shard"))
                print(f"| {size} | {label} | {seconds} | {mb} |", flush=True)
        print("\nPreparing, by ranks (seconds, written, peak growth of memory): " + "; ".join(wrote))


if __name__ == "__main__":
    main()
