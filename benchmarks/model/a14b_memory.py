"""GPU memory and step times of a rank at A14B's size, through the code that serves.

    python -m benchmarks.model.a14b_memory [--cases together swap split cpu:24 cpu:48 disk:24]
        [--sizes 832x480 1280x720] [--frames 81] [--mesh 1x1x1] [--layers 40] [--steps 4] [--compile] [--profile DIR]
                                     [--gap-ms 0]

Each case is a group of fresh processes that load the experts, warm up, and denoise one guided sample of each size, half
of its steps with each expert. `together`, `swap` and `split` are the placements of the experts; `cpu:24` and `disk:24`
are offload with a process's share of the device capped to nine tenths of 24 GB, at the first size only. Weights are
random; for `disk` they are written first, with `--disk-layers` layers, and compared with `sharded`, the same files with
all blocks on the device. `first step` is the one after the change of expert; `--steps 40` makes `all steps` a whole
job. `reserved` is what the allocator took of the device, which is more than the peak where its memory is fragmented.
Which steps took 5 % longer than most, and how long Python's collector took, is told beside the table; --profile has the
ranks write the kernels of all steps into a folder for each case and size. --gap-ms is the device's rest between steps,
of which an engine that serves makes some; ranks make it at once.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe
from benchmarks.model import dummy_checkpoint
from benchmarks.model.parity import run_ranks
from serve_app.config import Config
from serve_app.engine.messages import StepRequest, StepResult
from serve_app.engine.rank import Rank
from serve_app.request import Params
from serve_app.wan.parallel.mesh import AXES, Mesh
from serve_app.wan.weights.checkpoint import Checkpoint, Expert
from serve_app.wan.weights.writer import prepare

_NARROW = {"num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 192, "text_dim": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["together", "swap", "split", "cpu:24", "cpu:48"])
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x720"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--mesh", default="1x1x1", help="guidance x sequence x tensor")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--disk-layers", type=int, default=8, help="4.2 GB each in two files of float32 and bfloat16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", type=Path, help="write the kernels of every step")
    parser.add_argument("--gap-ms", type=float, default=0, help="rest between steps")
    parser.add_argument("--narrow", action="store_true", help="a width of 96, to see it run")
    options = parser.parse_args()
    if options.gap_ms < 0:
        parser.error(f"--gap-ms has value {options.gap_ms:g}, expected 0 or more")
    os.environ["WAN_SERVE_BENCHMARK"] = "1"
    narrow = _NARROW if options.narrow else {}
    mesh = Mesh(*map(int, options.mesh.split("x")))
    print(f"\n{describe()}; {_device()}; {options.frames} frames, {mesh}, guided steps\n", flush=True)
    columns = (
        "case",
        "size",
        "layers",
        "on the device",
        "load s",
        "warm-up s",
        "step s",
        "first step s",
        "all steps s",
        "weights GB",
        "peak GB",
        "reserved GB",
        "of the device",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = dummy_checkpoint.write(work / "model", {"num_layers": options.layers, **narrow})
        disk = {"num_layers": options.disk_layers, **narrow}
        for case in options.cases:
            kind, _, cap = case.partition(":")
            model = {"path": str(folder), "weights": "random"}
            if kind in ("disk", "sharded"):
                model = _written(work, disk, mesh.tensor)
            sizes = options.sizes[:1] if cap or kind == "sharded" else options.sizes
            config = _config(case, sizes, model, mesh, options)
            experts = ("transformer",) if kind == "split" else None
            given = (case, config.model_dump(), experts, sizes, options.steps, options.gap_ms)
            run_ranks(_measure, mesh, *given, timeout_s=1800, sees="own first" if torch.cuda.is_available() else "all")


def _config(case: str, sizes: list[str], model: dict[str, Any], mesh: Mesh, options: argparse.Namespace) -> Config:
    kind, _, cap = case.partition(":")
    cap_gb = float(cap or 0)
    width, height = max((_width_height(size) for size in sizes), key=math.prod)
    placed = {"together": "together", "split": "split", "sharded": "together"}.get(kind, "swap")
    denoiser = {
        "experts": placed,
        "offload": kind if kind in ("cpu", "disk") else "none",
        "parallel": {axis: mesh.size(axis) for axis in AXES},
        "compile": options.compile,
        "checkpoint_s": 0,
        "parked_memory_mib": 512,
        "profile": str(options.profile.absolute() / case) if options.profile else "",
    }
    if cap_gb and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        denoiser["memory_fraction"] = min(1.0, 0.9 * cap_gb * 1e9 / total)
    elif cap_gb:
        denoiser["resident_blocks"] = 1
    size_ = {"width": width, "height": height, "num_frames": options.frames}
    return Config.model_validate(
        {
            "model": {**model, "dtype": "bfloat16"},
            "defaults": size_,
            "limits": {"pixels": width * height, "num_frames": options.frames},
            "denoiser": denoiser,
        }
    )


def _written(work: Path, expert: dict[str, Any], tensor: int) -> dict[str, str]:
    """A model whose experts have bytes on the disk, and its sharded checkpoint, made once."""
    folder, shards = work / "written", work / "shards"
    if not folder.is_dir():
        dummy_checkpoint.write(folder, expert)
        checkpoint = Checkpoint(folder, random=True)
        for name in checkpoint.experts:
            _fill(folder / name, checkpoint, name)
        prepare(Checkpoint(folder), shards, tensor, "bfloat16")
    return {"path": str(folder), "sharded": str(shards)}


def _fill(where: Path, checkpoint: Checkpoint, name: Expert) -> None:
    """Put random numbers into the holes of a weight file, in its order."""
    from serve_app.wan.weights.random_weights import RandomWeights

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (file,) = where.glob("*.safetensors")
    weights = RandomWeights(checkpoint.folder / name, device)
    with file.open("r+b") as stream:
        for tensor in sorted(weights.names(), key=weights.position):
            stream.seek(weights.position(tensor)[1])
            stream.write(weights.read(tensor).cpu().numpy().data)


def _width_height(size: str) -> tuple[int, int]:
    width, height = map(int, size.split("x"))
    return width, height


def _measure(
    rank: int,
    mesh: Mesh,
    port: int,
    case: str,
    config: dict[str, Any],
    experts: tuple[Expert, ...] | None,
    sizes: list[str],
    steps: int,
    gap_ms: float,
) -> None:
    parsed = Config.model_validate(config)
    ours = Rank(parsed, rank, experts)
    started = time.perf_counter()
    ours.load("127.0.0.1", port, mesh)
    loaded = time.perf_counter() - started
    for size in sizes:
        width, height = _width_height(size)
        params = Params(**parsed.defaults.model_dump(), prompt="a cat", seed=0).model_copy(
            # Half of the steps for each expert: at shift 1 timesteps are evenly spaced.
            update={
                "width": width,
                "height": height,
                "num_inference_steps": steps,
                "flow_shift": 1.0,
                "boundary_ratio": 0.0 if experts else 0.5,
            }
        )
        row = {"size": size, "load": loaded, **_denoised(ours, params, size == sizes[0], gap_ms)}
        if rank == 0:
            _print(case, row)
        print(f"rank {rank}, {case}, {size}: {row['told']}", file=sys.stderr, flush=True)


def _denoised(ours: Rank, params: Params, first: bool, gap_ms: float) -> dict[str, Any]:
    """Return the times of the steps of one sample.

    First-time work of the process is done before; that of a later size is in its first step, which is in `all steps s`
    alone.
    """
    started = time.perf_counter()
    if first:
        ours.warm_up(params)
    warm = time.perf_counter() - started
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    text = np.ones((3, _text_dim(ours._config)), dtype=np.float32)
    name = f"{params.width}x{params.height}"
    admitted = ours.admit(name, params, text, 2 * text)
    steps = admitted.steps
    pauses: list[float] = []
    gc.callbacks.append(lambda phase, _: pauses.append((1 if phase == "stop" else -1) * time.perf_counter()))
    seconds = []
    for _ in range(steps):
        time.sleep(gap_ms / 1e3)
        seconds.append(StepResult.from_wire(ours.step(StepRequest([name]).to_wire())).seconds)
    gc.callbacks.pop()
    ours.drop([name])
    usual = statistics.median(seconds)
    slow = {step: round(one, 3) for step, one in enumerate(seconds, 1) if one > 1.05 * usual}
    middle = admitted.boundary if 0 < admitted.boundary < steps else 0
    slots = ours.model.experts._block_swap
    free, total = torch.cuda.mem_get_info() if cuda else (0, 1)
    return {
        "warm": warm,
        "step": statistics.median([one for step, one in enumerate(seconds) if step not in (0, middle)] or seconds),
        "first": seconds[middle],
        "weights": ours.model.experts.device_bytes,
        "layers": int(ours.model.checkpoint.expert_config("transformer")["num_layers"]),
        "slots": None if slots is None else len(slots._slots),
        "peak": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
        "used": 1 - free / total if cuda else 0,
        "all": sum(seconds),
        "told": f"steps over 1.05 x {usual:.3f} s: {slow}; collector {sum(pauses):.3f} s in {len(pauses) // 2} rounds",
    }


def _text_dim(config: Config) -> int:
    return int(Checkpoint(config.model.folder).expert_config("transformer")["text_dim"])


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _print(case: str, row: dict[str, Any]) -> None:
    numbers = " | ".join(f"{row[key]:.2f}" for key in ("load", "warm", "step", "first", "all"))
    memory = " | ".join(f"{row[key] / 1e9:.1f}" for key in ("weights", "peak", "reserved"))
    layers, slots = row["layers"], row["layers"] if row["slots"] is None else row["slots"]
    print(
        f"| {case} | {row['size']} | {layers} | {slots} | {numbers} | {memory} | {100 * row['used']:.0f} % |",
        flush=True,
    )


if __name__ == "__main__":
    main()
