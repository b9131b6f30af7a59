"""What a table has to say about where it was measured."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe() -> str:
    """One line: date, processor, cores, versions."""
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
