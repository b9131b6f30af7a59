"""Host memory and bytes read by each rank while it loads an expert, against the size of its shard.

    python -m benchmarks.model.rank_memory [--model DIR]

prints a markdown table. Without a folder it makes a random expert of half a gigabyte.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import torch

from benchmarks.model.parity import run_ranks
from benchmarks.usage import measured
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import init_process_groups
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import Checkpoint

MB = 1 << 20
SIZES = (1, 2, 4)
"""Numbers of ranks."""


def write_large(folder: Path) -> Path:
    """Write a checkpoint whose first expert has half a gigabyte in float32, in files of at most 100 MB."""
    from diffusers import WanTransformer3DModel

    from tests.support.random_checkpoint import write

    write(folder)
    for file in (folder / "transformer").iterdir():
        file.unlink()
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=16, attention_head_dim=64, text_dim=64, freq_dim=64, ffn_dim=4096, num_layers=7
    )
    model.save_pretrained(folder / "transformer", max_shard_size="100MB")
    return folder


def measure(folder: Path, size: int, dtype: str = "float32") -> list[dict[str, int]]:
    """Load the first expert on `size` ranks.

    Returns:
        For each rank the bytes of `shard` (its parameters), `growth` (peak resident memory above what the process held
        before loading), `held` (the same at the end) and `read` (from files).
    """
    with tempfile.TemporaryDirectory() as name:
        run_ranks(_load, Mesh(tensor=size), folder, dtype, Path(name))
        return [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in range(size)]


def _load(rank: int, mesh: Mesh, port: int, folder: Path, dtype: str, output: Path) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    checkpoint = Checkpoint(folder)
    groups = init_process_groups(rank, mesh, "127.0.0.1", port, device, timeout_s=120)
    with measured() as usage:
        model = load_expert(checkpoint, "transformer", groups, getattr(torch, dtype), device)
    result = {
        "shard": sum(p.numel() * p.element_size() for p in model.parameters()),
        "growth": usage.growth,
        "held": usage.held,
        "read": usage.read,
    }
    (output / f"{rank}.json").write_text(json.dumps(result))
    groups.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; a large random one if not given")
    model = parser.parse_args().model
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would print that it found nothing else
    with tempfile.TemporaryDirectory() as name:
        folder = model or write_large(Path(name))
        whole = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
        print(f"Expert of {whole / MB:.0f} MB on disk; the worst rank of each group, in MB.\n")
        print("| dtype | ranks | shard | peak growth | growth / shard | held at the end | read from files |")
        print("|---|---|---|---|---|---|---|")
        for dtype in ("float32", "bfloat16"):
            for size in SIZES:
                ranks = measure(folder, size, dtype)
                worst = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
                mb = {key: f"{value / MB:.0f}" for key, value in worst.items()}
                ratio = worst["growth"] / worst["shard"]
                print(
                    f"| {dtype} | {size} | {mb['shard']} | {mb['growth']} | {ratio:.2f} | {mb['held']} | {mb['read']} |"
                )


if __name__ == "__main__":
    main()
