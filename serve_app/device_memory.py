"""The memory of one process on its device, measured: allocated, reserved, the peak, and what is free, by component.

On CPUs it is the memory of the process, and the device is its host. Imports torch where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_OTHER = "other"


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a process on its device.

    Attributes:
        allocated: of tensors that are alive; on CPUs of the process.
        reserved: held of the device, the allocator's own reserve included.
        peak: the most that was allocated since the last look.
        free: free on the device, for whoever comes first.
        limit: the most that the process may take; infinite if nothing says.
        parts: allocated bytes by component; `other` is the rest.
        planned: what the plan gives the process; 0 if it was not planned.
    """

    allocated: float = 0.0
    reserved: float = 0.0
    peak: float = 0.0
    free: float = 0.0
    limit: float = math.inf
    parts: Mapping[str, float] = field(default_factory=dict)
    planned: float = 0.0

    @property
    def headroom(self) -> float:
        """Share of what the process may take that its peak has left, from 0 to 1.

        It may take its limit, or less where others hold so much that the device has less to give.
        """
        most = min(self.limit, self.reserved + self.free)
        return max(0.0, 1 - self.peak / most) if most > 0 and math.isfinite(most) else 1.0

    @property
    def largest(self) -> str:
        """The component that takes most beside the weights, in words; empty if none is known.

        What a step takes is the peak beyond what is allocated when it is done.
        """
        found = {name: size for name, size in self.parts.items() if name != "weights"}
        found["the step"] = self.peak - self.allocated
        name = max(found, key=lambda one: found[one])
        return f"{name} ({found[name] / 2**20:.0f} MiB)"

    def plain(self) -> dict[str, Any]:
        """Return the numbers as plain values, an infinite limit as None."""
        return {**asdict(self), "limit": self.limit if math.isfinite(self.limit) else None}


def measure(
    device: torch.device, limit: float, parts: Mapping[str, float], planned: float = 0.0, anew: bool = False
) -> DeviceMemory:
    """Measure the memory of this process.

    Args:
        device: where it computes.
        limit: bytes that it may take.
        parts: bytes of its components.
        planned: bytes that the plan gives it.
        anew: whether the peak begins anew after this look.
    """
    import psutil

    if device.type == "cuda":
        import torch

        allocated, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        reserved, free = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[0]
        if anew:
            torch.cuda.reset_peak_memory_stats(device)
    else:
        allocated = peak = reserved = _process().memory_info().rss
        free = psutil.virtual_memory().available
    rest = {_OTHER: max(0.0, allocated - sum(parts.values()))}
    return DeviceMemory(allocated, reserved, peak, free, limit, {**parts, **rest}, planned)


def host_limit(fraction: float, processes: int) -> float:
    """Return the bytes of host memory that one of so many processes may take of a share of it."""
    import psutil

    return float(fraction * psutil.virtual_memory().total / processes)


@lru_cache(maxsize=1)
def _process() -> Any:
    import psutil

    return psutil.Process()
