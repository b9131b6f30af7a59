"""The parts of the memory that one process takes of a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GB = 1e9
GIB = 2**30


@dataclass(frozen=True)
class Part:
    """A part of a process's memory.

    Attributes:
        name: what lies there, in words.
        bytes: how much at most.
        option: the options that change it, in words; empty if none does.
        weights: whether it is weights.
    """

    name: str
    bytes: float
    option: str = ""
    weights: bool = False


@dataclass(frozen=True)
class ProcessMemory:
    """The memory of one process on one device.

    Attributes:
        process: kind of process: `rank`, `encoder` or `decoder`.
        option: section of the configuration that has its `memory_fraction`.
        fraction: share of the device's memory that it may take.
        gpus: GPUs that Ray reserves for it; 0 for a process on CPUs.
        parts: what its allocator holds on the device.
        beside: what lies on the device beyond its share, such as the CUDA context.
        host: what it holds in its host's memory, beside its libraries.
        work: what the largest step is, in words.
        reserve: parts by these names are given back where memory is short, so a process starts without them.
    """

    process: str
    option: str
    fraction: float
    gpus: float
    parts: tuple[Part, ...]
    beside: tuple[Part, ...] = ()
    host: tuple[Part, ...] = ()
    work: str = ""
    reserve: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return total(self.parts)

    @property
    def least(self) -> float:
        """Bytes without which the process cannot work."""
        return total([part for part in self.parts if part.name not in self.reserve])

    @property
    def weights(self) -> float:
        """Bytes of the weights among the parts."""
        return total([part for part in self.parts if part.weights])

    def bytes_of(self, *names: str) -> float:
        """Return the bytes of the parts by these names."""
        return total([part for part in (*self.parts, *self.beside, *self.host) if part.name in names])


def total(parts: Sequence[Part]) -> float:
    """Return the bytes of some parts together."""
    return sum(part.bytes for part in parts)
