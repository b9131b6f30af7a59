"""Seconds and memory of finishing, on one core and more, and strange videos.

    python -m benchmarks.finish.speed [--cores 1 2] [--size 1280x720] [--frames 81] [--memory-frames 81 801]

Each row is a process of its own with so many cores (as `taskset` gives them). Frames are a grainy texture that pans and
turns, drawn before the clock starts; for the memory they are drawn one by one. `wall` is the time of 16 → 32 frames per
second, `beside` the time after the last frame when frames come evenly within 4 s, as from a decode. Sixteen cores are
estimated: the CPU time of the threads divided by sixteen, which is the least that is possible.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.finish.clips import texture
from benchmarks.machine import describe
from serve_app.finish.finisher import finish_video
from serve_app.finish.plan import Finish, VideoFormat

PLANS: dict[str, dict[str, Any]] = {
    "encode": {"encode": {}},
    "interpolate 32": {"interpolate": {"fps": 32}},
    "upscale 2": {"upscale": 2},
}
DECODE_S = 4.0


def one(plan: str, size: str, frames: int, cores: int, mode: str) -> dict[str, float]:
    """Finish one video in this process, and return seconds, CPU seconds, and MiB of memory."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    width, height = map(int, size.split("x"))
    source = VideoFormat(width, height, 16, frames)
    drawn: Any = texture(frames, height, width)
    if mode != "memory":
        drawn = list(drawn)
    came = 0.0

    def coming() -> Iterator[np.ndarray]:
        nonlocal came
        began = time.perf_counter()
        for index, frame in enumerate(drawn, 1):
            if mode == "beside":
                time.sleep(max(0.0, began + DECODE_S * index / frames - time.perf_counter()))
            came = time.perf_counter()
            yield frame

    with tempfile.TemporaryDirectory() as folder:
        began, cpu = time.perf_counter(), time.process_time()
        made = finish_video(coming(), source, Finish.model_validate(PLANS[plan]), Path(folder))
        ended = time.perf_counter()
    return {
        "wall": ended - began,
        "after": ended - came,
        "cpu": time.process_time() - cpu,
        "frames": made.format.num_frames,
        "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measure(*arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.finish.speed", "--one", *map(str, arguments)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--memory-frames", type=int, nargs="*", default=[81, 801])
    parser.add_argument("--memory-size", default="640x368")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        plan, size, frames, cores, mode = options.one
        print(json.dumps(one(plan, size, int(frames), int(cores), mode)))
        return
    print(f"\n{describe()}; load {os.getloadavg()[0]:.1f}\n")
    print(f"{options.size}, {options.frames} frames at 16 frames per second; `beside` as above:\n")
    print("| steps | cores | frames out | wall s | s a frame out | CPU s | CPU s / 16 | s beside |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for plan in PLANS:
        for cores in options.cores:
            alone = measure(plan, options.size, options.frames, cores, "wall")
            beside = measure(plan, options.size, options.frames, cores, "beside")
            print(
                f"| {plan} | {cores} | {alone['frames']:.0f} "
                f"| {alone['wall']:.1f} | {alone['wall'] / alone['frames']:.3f} "
                f"| {alone['cpu']:.1f} | {alone['cpu'] / 16:.2f} | {beside['after']:.1f} |",
                flush=True,
            )
    print(f"\nMost memory of the process at {options.memory_size}, two cores, 16 → 32:\n")
    print("| frames in | frames out | MiB |\n|---|---|---|", flush=True)
    for frames in options.memory_frames:
        found = measure("interpolate 32", options.memory_size, frames, 2, "memory")
        print(f"| {frames} | {found['frames']:.0f} | {found['MiB']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
