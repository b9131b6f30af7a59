"""Our latents against those of `diffusers.WanPipeline`, same folder, same seeds, on every mesh of 1, 2, 4 ranks.

    python -m benchmarks.model.parity --model DIR

prints the relative error of each case in float32 on the CPU, as a markdown table.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import platform
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch

from serve_app.config import WAN_NEGATIVE_PROMPT
from serve_app.request import Params
from serve_app.wan.generate import Generator
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import init_process_groups

Seen = Literal["all", "own", "own first"]
"""The GPUs that a rank sees."""
MESHES = [
    Mesh(guidance, sequence, ranks // (guidance * sequence))
    for ranks in (1, 2, 4)
    for guidance in (1, 2)
    for sequence in (1, 2, 4)
    if ranks % (guidance * sequence) == 0
]


def bound(mesh: Mesh) -> float:
    """Return the largest relative error that counts as equal."""
    return 1e-5 if mesh.ranks == 1 else 1e-4


_BASE: dict[str, Any] = {
    "prompt": "a red circle moves left on a white background",
    "negative_prompt": WAN_NEGATIVE_PROMPT,
    "width": 64,
    "height": 64,
    "num_frames": 9,
    "fps": 16,
    "seed": 0,
    "num_inference_steps": 8,
    "guidance_scale": 4.0,
    "guidance_scale_2": 3.0,
    "flow_shift": 5.0,
    "boundary_ratio": 0.875,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "64x64, 9 frames, 8 steps": {},
    "wide, 13 frames, 5 steps": {"width": 96, "height": 64, "num_frames": 13, "num_inference_steps": 5},
    "high, 1 frame, shift 12": {"width": 48, "height": 80, "num_frames": 1, "flow_shift": 12.0},
    "guidance off": {"guidance_scale": 1.0, "seed": 1},
    "guidance 6.5, then 1.5": {"guidance_scale": 6.5, "guidance_scale_2": 1.5, "seed": 2},
    "Chinese, short negative": {"prompt": "蓝色的星星在黑色背景上向右移动", "negative_prompt": "模糊", "seed": 3},
    "empty negative, HTML in prompt": {
        "prompt": "a  green &amp;amp; blue\n square",
        "negative_prompt": "",
        "seed": 2**40,
    },
    "20 steps, boundary 0.5": {"num_inference_steps": 20, "boundary_ratio": 0.5, "seed": 4},
}
CASES = {name: Params(**{**_BASE, **change}) for name, change in _CHANGES.items()}


def arguments(params: Params) -> dict[str, Any]:
    """Return the arguments of `WanPipeline` for the same video; shift and boundary are set on the pipeline itself."""
    names = ("prompt", "negative_prompt", "width", "height", "num_frames", "num_inference_steps")
    scales = ("guidance_scale", "guidance_scale_2")
    generator = torch.Generator("cpu").manual_seed(params.seed)
    return {**{name: getattr(params, name) for name in names + scales}, "generator": generator}


def reference(folder: Path) -> dict[str, torch.Tensor]:
    """Return the latents of WanPipeline, by case."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    latents = {}
    for name, params in CASES.items():
        pipeline.scheduler = UniPCMultistepScheduler.from_config(
            pipeline.scheduler.config, flow_shift=params.flow_shift
        )
        pipeline.register_to_config(boundary_ratio=params.boundary_ratio)
        latents[name] = pipeline(
            **arguments(params),
            output_type="latent",
        ).frames
    return latents


def ours(folder: Path, mesh: Mesh, cases: Sequence[str] = tuple(CASES)) -> list[dict[str, torch.Tensor]]:
    """Return our latents, for each rank by case."""
    with tempfile.TemporaryDirectory() as name:
        run_ranks(_denoise_cases, mesh, folder, list(cases), Path(name))
        return [torch.load(Path(name) / f"{rank}.pt") for rank in range(mesh.ranks)]


def run_ranks(target: Any, mesh: Mesh, *args: Any, timeout_s: float = 240, sees: Seen = "all") -> None:
    """Run `target(rank, mesh, port, *args)` in as many processes of their own.

    Args:
        target: what each process calls.
        mesh: its ranks are the processes.
        *args: further arguments of `target`.
        timeout_s: seconds after which all are killed.
        sees: GPUs that each process sees: all, its own alone, or all with its own as the first, as ranks under Ray do.
            This has to be settled before it starts: imports may ask CUDA for devices.

    Raises:
        RuntimeError: one failed or all took too long.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = _context()
    processes = [
        context.Process(target=target, args=(rank, mesh, port, *args), daemon=True) for rank in range(mesh.ranks)
    ]
    for rank, process in enumerate(processes):
        with patch.dict(os.environ, {} if sees == "all" else {"CUDA_VISIBLE_DEVICES": _devices_of(rank, sees)}):
            process.start()
    end = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")
    if None in codes:
        raise RuntimeError(f"ranks are not done after {timeout_s} s: {codes}")


@functools.cache
def _context() -> Any:
    """Return how processes start: from one with all imports, where nothing there can ask CUDA for devices."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["serve_app.wan.generate", "serve_app.wan.transformer.load", "deepspeed"])
    return context


def _devices_of(rank: int, sees: Seen) -> str:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    own = there[rank]
    return own if sees == "own" else ",".join([own, *(one for one in there if one != own)])


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the reference."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def _denoise_cases(rank: int, mesh: Mesh, port: int, folder: Path, cases: list[str], output: Path) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // mesh.ranks))
    groups = init_process_groups(rank, mesh, "127.0.0.1", port, torch.device("cpu"), timeout_s=120)
    generator = Generator(folder, groups=groups)
    torch.save({name: generator.latents(CASES[name]) for name in cases}, output / f"{rank}.pt")
    groups.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    folder = parser.parse_args().model
    theirs = reference(folder)
    results = {mesh: ours(folder, mesh)[0] for mesh in MESHES}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float32\n")
    print("guidance x sequence x tensor:\n")
    print("| case | " + " | ".join(f"{m.guidance}x{m.sequence}x{m.tensor}" for m in MESHES) + " |")
    print("|---|" + "---|" * len(MESHES))
    for name, latents in theirs.items():
        row = " | ".join(f"{relative_error(results[mesh][name], latents):.1e}" for mesh in MESHES)
        print(f"| {name} | {row} |")


if __name__ == "__main__":
    main()
