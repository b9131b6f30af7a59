"""One rank of a group as a process of its own: `python -m tests.wan.ranks`, in whatever environment a test gives it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks.parity import CASES
from serve_app.wan.generate import Generator
from serve_app.wan.mesh import Mesh
from serve_app.wan.world import init_world

CASE = "64x64, 9 frames, 8 steps"


def main(rank: int, size: int, address: str, port: int, folder: str, output: str, dtypes: list[str]) -> None:
    """Denoise one case in each dtype and save latents and parameter dtypes as `<output>/<dtype>-<rank>.pt`."""
    torch.set_num_threads(1)
    world = init_world(rank, Mesh(tensor=size), address, port, torch.device("cpu"), timeout_s=120)
    for dtype in dtypes:
        generator = Generator(Path(folder), dtype=getattr(torch, dtype), world=world)
        result = {
            "latents": generator.latents(CASES[CASE]),
            "dtypes": {name: p.dtype for name, p in generator.experts["transformer"].named_parameters()},
            "parameters": sum(p.numel() for p in generator.experts["transformer"].parameters()),
        }
        torch.save(result, Path(output) / f"{dtype}-{rank}.pt")
    world.close()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
