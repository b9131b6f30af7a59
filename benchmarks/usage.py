"""Time, memory and bytes read by a part of a process's work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Usage:
    """Seconds by the clock and (`cpu`) of the processor, and bytes.

    `growth` is the peak of resident memory above what the process held before, `held` what is left of it at the end.
    `read` came from files by calls. `faulted` came from the disk itself: that counts the pages of memory maps as well,
    and what the kernel read ahead, but nothing that was in the page cache.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    growth: int = 0
    held: int = 0
    read: int = 0
    faulted: int = 0


@contextmanager
def measured() -> Iterator[Usage]:
    """Yield the usage of the block, filled in at its end."""
    usage = Usage()
    with suppress(OSError):  # not allowed everywhere; an earlier peak then counts as well
        Path("/proc/self/clear_refs").write_text("5")
    before, read, faulted = _status("VmRSS"), _io("rchar"), _io("read_bytes")
    started, cpu = time.monotonic(), time.process_time()
    yield usage
    usage.seconds, usage.cpu = time.monotonic() - started, time.process_time() - cpu
    usage.growth, usage.held = _status("VmHWM") - before, _status("VmRSS") - before
    usage.read, usage.faulted = _io("rchar") - read, _io("read_bytes") - faulted


def _status(field: str) -> int:
    return int(_field("status", field).split()[0]) << 10


def _io(field: str) -> int:
    return int(_field("io", field))


def _field(file: str, field: str) -> str:
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value
    raise RuntimeError(f"/proc/self/{file} has no {field}")
