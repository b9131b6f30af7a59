"""One rank of a group as a process of its own: `python -m tests.support.ranks`, in the environment of a test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks.model.parity import CASES
from serve_app.wan.generate import Generator
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import init_process_groups
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.sharded import ShardedCheckpoint

CASE = "64x64, 9 frames, 8 steps"


def main(rank: int, size: int, address: str, port: int, folder: str, output: str, dtypes: list[str]) -> None:
    """Denoise one case in each dtype and save latents and parameter dtypes as `<output>/<dtype>-<rank>.pt`."""
    torch.set_num_threads(1)
    world = init_process_groups(rank, Mesh(tensor=size), address, port, torch.device("cpu"), timeout_s=120)
    for dtype in dtypes:
        generator = Generator(Path(folder), dtype=getattr(torch, dtype), groups=world)
        result = {
            "latents": generator.latents(CASES[CASE]),
            "dtypes": {name: p.dtype for name, p in generator.experts["transformer"].named_parameters()},
            "exchanged": world.exchanged,
            "parameters": sum(p.numel() for p in generator.experts["transformer"].parameters()),
        }
        torch.save(result, Path(output) / f"{dtype}-{rank}.pt")
    world.close()


def compare(rank: int, mesh: Mesh, port: int, folder: Path, sharded: dict[str, Path]) -> None:
    """Load both experts by slices and from the prepared folder of each dtype, and fail if a bit differs."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    world = init_process_groups(rank, mesh, "127.0.0.1", port, cpu, timeout_s=120)
    checkpoint = Checkpoint(folder)
    for dtype, out in sharded.items():
        for expert in checkpoint.experts:
            ours = load_expert(
                checkpoint,
                expert,
                world,
                getattr(torch, dtype),
                cpu,
                sharded=ShardedCheckpoint(out, checkpoint, mesh.tensor, dtype),
            ).state_dict()
            theirs = load_expert(checkpoint, expert, world, getattr(torch, dtype), cpu).state_dict()
            assert list(ours) == list(theirs)
            for name, tensor in theirs.items():
                assert ours[name].dtype == tensor.dtype, name
                assert torch.equal(ours[name], tensor), name
    world.close()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
