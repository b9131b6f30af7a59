"""The machine that a table was measured on, the timer of its devices, and the sizes of its clips."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch


def describe() -> str:
    """Return date, processor, cores and versions in one line."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "ray", "deepspeed"))
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{today}, {model}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}"


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a device takes for what `run` gives it."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def tokens_of(size: str, frames: int) -> int:
    """Return the number of video tokens of an A14B clip, whose size is WIDTHxHEIGHT."""
    width, height = map(int, size.split("x"))
    return ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
