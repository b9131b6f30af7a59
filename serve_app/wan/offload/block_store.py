"""Where the blocks of experts wait that are not on the device: in host memory, or in the files they come from.

Knows nothing of slots: it is told where to copy a block to.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from serve_app.wan.offload.copies import Copies
from serve_app.wan.weights.checkpoint import Expert
from serve_app.wan.weights.reader import Weights
from serve_app.wan.weights.shard_spec import ShardSlice, each

Key: TypeAlias = tuple[Expert, int]
"""An expert and a layer of it."""

_ALIGN = 256  # bytes: what kernels like best, and a multiple of every element's size


@dataclass(frozen=True)
class _Place:
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How the parameters of a block lie in one piece of memory; all blocks are alike.

    Attributes:
        places: of the parameters, in the order of `order`.
        nbytes: of all of them.
    """

    places: tuple[_Place, ...]
    nbytes: int

    @classmethod
    def of(cls, parts: Sequence[ShardSlice]) -> Layout:
        """That of a block with these parameters."""
        places, offset = [], 0
        for part in cls.order(parts):
            places.append(_Place(offset, part.dtype, part.shape))
            offset += -(-part.nbytes // _ALIGN) * _ALIGN
        return cls(tuple(places), offset)

    @staticmethod
    def order(parts: Iterable[ShardSlice]) -> list[ShardSlice]:
        """The parameters in the order in which they lie."""
        return sorted(parts, key=lambda part: part.name.split(".", 2)[2])

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The parameters in `memory`, bytes as many as `nbytes`, in order."""
        found = []
        for place in self.places:
            like = torch.empty(place.shape, dtype=place.dtype, device="meta")
            found.append(memory[place.offset : place.offset + like.nbytes].view(place.dtype).view(place.shape))
        return found


class BlockStore(Protocol):
    """Blocks by expert and layer."""

    def take(self, key: Key, layout: Layout, parts: Sequence[ShardSlice], weights: Weights) -> None:
        """Bring in a block.

        Raises:
            CheckpointError: the weights are damaged.
        """

    def fetch(self, key: Key, target: torch.Tensor, after: Any, copies: Copies) -> Callable[[], Any]:
        """Begin to copy a block into device memory, not before the event `after`.

        Returns:
            What gives the event that it is there, as soon as there is one.
        """


class HostBlocks:
    """In host memory, pinned where a device copies from it by itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[Key, torch.Tensor] = {}

    def take(self, key: Key, layout: Layout, parts: Sequence[ShardSlice], weights: Weights) -> None:
        """See `BlockStore`."""
        self._memory[key] = memory = host_memory(layout.nbytes, self._device)
        _read(layout, parts, weights, memory)

    def fetch(self, key: Key, target: torch.Tensor, after: Any, copies: Copies) -> Callable[[], Any]:
        """See `BlockStore`."""
        event = copies.start(target, self._memory[key], after)
        return lambda: event


@dataclass(frozen=True)
class _Source:
    layout: Layout
    parts: Sequence[ShardSlice]
    weights: Weights


class FileBlocks:
    """In files, from which a thread reads them into host memory of two blocks.

    Checksums are compared the first time that a block is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sources: dict[Key, _Source] = {}
        self._buffers: list[torch.Tensor] = []
        self._copied: list[Any] = [None, None]
        self._turn = 0
        self._seen: set[Key] = set()
        self._reader = ThreadPoolExecutor(1, "blocks")

    def take(self, key: Key, layout: Layout, parts: Sequence[ShardSlice], weights: Weights) -> None:
        """See `BlockStore`."""
        self._sources[key] = _Source(layout, layout.order(parts), weights)
        while len(self._buffers) < len(self._copied):
            self._buffers.append(host_memory(layout.nbytes, self._device))

    def fetch(self, key: Key, target: torch.Tensor, after: Any, copies: Copies) -> Callable[[], Any]:
        """See `BlockStore`."""
        return self._reader.submit(self._fetch, key, target, after, copies).result

    def _fetch(self, key: Key, target: torch.Tensor, after: Any, copies: Copies) -> Any:
        self._turn = 1 - self._turn
        source, buffer = self._sources[key], self._buffers[self._turn]
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()
        _read(source.layout, source.parts, source.weights, buffer, check=key not in self._seen)
        self._seen.add(key)
        self._copied[self._turn] = event = copies.start(target, buffer, after)
        return event


def _read(
    layout: Layout, parts: Sequence[ShardSlice], weights: Weights, memory: torch.Tensor, check: bool = True
) -> None:
    views = {part.name: view for part, view in zip(layout.order(parts), layout.views(memory), strict=True)}

    def read(part: ShardSlice) -> None:
        weights.read(part.name, part.dim, part.start, part.stop, part.dtype, out=views[part.name], check=check)

    for _ in each(parts, weights, read):
        pass


def host_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """Bytes in host memory that a device copies to and from by itself.

    torch's own pinned memory is rounded up to a power of two, which for blocks of A14B is half as much again. Pages are
    huge where the kernel has some: fewer to bring in and to pin.

    Raises:
        RuntimeError: the driver does not pin so much.
    """
    pages = _Pages(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if device.type == "cuda":
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0))
        pages.pinned = memory.data_ptr()
    return memory


class _Pages(mmap.mmap):
    """Memory that is unpinned before it goes: what lies at its address later would be taken for pinned."""

    pinned: int | None = None

    def __del__(self) -> None:
        if self.pinned is not None:
            torch.cuda.cudart().cudaHostUnregister(self.pinned)
