"""Stores of the blocks of experts that are not on the device: host memory, or the files they come from.

Knows nothing of slots: a store is told which memory to copy a block to.
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
from serve_app.wan.weights.shard_spec import ShardSlice, read_in_file_order

Key: TypeAlias = tuple[Expert, int]
"""An expert and the number of one of its layers."""

_ALIGN = 256  # bytes: fastest for kernels, and a multiple of the size of every dtype


@dataclass(frozen=True)
class _Region:
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Positions of a block's parameters in one contiguous memory; the same for all blocks.

    Attributes:
        regions: one for each parameter, in the order of `in_order`.
        nbytes: bytes of all parameters, with the gaps that alignment leaves.
    """

    regions: tuple[_Region, ...]
    nbytes: int

    @classmethod
    def of_block(cls, slices: Sequence[ShardSlice]) -> Layout:
        """Return the layout of a block with these parameters."""
        regions, offset = [], 0
        for part in cls.in_order(slices):
            regions.append(_Region(offset, part.dtype, part.shape))
            offset += -(-part.nbytes // _ALIGN) * _ALIGN
        return cls(tuple(regions), offset)

    @staticmethod
    def in_order(slices: Iterable[ShardSlice]) -> list[ShardSlice]:
        """Return a block's parameters in the order in which they lie in memory."""
        return sorted(slices, key=lambda part: part.name.split(".", 2)[2])

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Return the parameters that lie in `memory`, which has `nbytes` bytes, in order."""
        found = []
        for region in self.regions:
            like = torch.empty(region.shape, dtype=region.dtype, device="meta")
            found.append(memory[region.offset : region.offset + like.nbytes].view(region.dtype).view(region.shape))
        return found


class BlockStore(Protocol):
    """Blocks by expert and layer."""

    def add_block(self, key: Key, layout: Layout, slices: Sequence[ShardSlice], weights: Weights) -> None:
        """Take a block into the store.

        Args:
            key: expert and layer.
            layout: positions of the block's parameters in memory.
            slices: one for each parameter of the block.
            weights: reader of the slices.

        Raises:
            CheckpointError: the weights are damaged.
        """

    def begin_copy(self, key: Key, target: torch.Tensor, after: Any, copies: Copies) -> Callable[[], Any]:
        """Begin to copy a block into device memory, not before the event `after`.

        Returns:
            A function that waits until the copy has been handed to the device, and returns the event that it is done.
        """


class HostBlocks:
    """Blocks in host memory, pinned if the device is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[Key, torch.Tensor] = {}

    def add_block(self, key: Key, layout: Layout, slices: Sequence[ShardSlice], weights: Weights) -> None:
        """See `BlockStore`."""
        self._memory[key] = memory = host_memory(layout.nbytes, self._device)
        _read_block(layout, slices, weights, memory)

    def begin_copy(self, key: Key, target: torch.Tensor, after: Any, copies: Copies) -> Callable[[], Any]:
        """See `BlockStore`."""
        event = copies.start(target, self._memory[key], after)
        return lambda: event


@dataclass(frozen=True)
class _BlockInFile:
    layout: Layout
    slices: Sequence[ShardSlice]
    weights: Weights


class FileBlocks:
    """Blocks in files, from which a thread reads them through two buffers in host memory.

    Checksums are compared the first time that a block is read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: dict[Key, _BlockInFile] = {}
        self._buffers: list[torch.Tensor] = []
        self._copied: list[Any] = [None, None]  # events that the last copy out of each buffer is done
        self._current = 0  # index of the buffer in use
        self._checked: set[Key] = set()
        self._reader = ThreadPoolExecutor(1, "blocks")

    def add_block(self, key: Key, layout: Layout, slices: Sequence[ShardSlice], weights: Weights) -> None:
        """See `BlockStore`."""
        self._blocks[key] = _BlockInFile(layout, layout.in_order(slices), weights)
        while len(self._buffers) < len(self._copied):
            self._buffers.append(host_memory(layout.nbytes, self._device))

    def begin_copy(self, key: Key, target: torch.Tensor, after: Any, copies: Copies) -> Callable[[], Any]:
        """See `BlockStore`."""
        return self._reader.submit(self._read_and_copy, key, target, after, copies).result

    def _read_and_copy(self, key: Key, target: torch.Tensor, after: Any, copies: Copies) -> Any:
        self._current = 1 - self._current
        block, buffer = self._blocks[key], self._buffers[self._current]
        if (copied := self._copied[self._current]) is not None:
            copied.synchronize()
        _read_block(block.layout, block.slices, block.weights, buffer, check=key not in self._checked)
        self._checked.add(key)
        self._copied[self._current] = event = copies.start(target, buffer, after)
        return event


def _read_block(
    layout: Layout, slices: Sequence[ShardSlice], weights: Weights, memory: torch.Tensor, check: bool = True
) -> None:
    views = {part.name: view for part, view in zip(layout.in_order(slices), layout.views(memory), strict=True)}

    def read(part: ShardSlice) -> None:
        weights.read(part.name, part.dim, part.start, part.stop, part.dtype, out=views[part.name], check=check)

    for _ in read_in_file_order(slices, weights, read):
        pass


def host_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return host memory of `nbytes` bytes, pinned if the device is a GPU.

    torch's own pinned memory is rounded up to a power of two, which for blocks of A14B is half as much again. Pages are
    huge where the kernel has some: there are fewer to bring in and to pin.

    Raises:
        RuntimeError: the driver does not pin so much.
    """
    pages = _Pages(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if device.type == "cuda":
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0))
        pages.pinned = memory.data_ptr()
    return memory


class _Pages(mmap.mmap):
    """Memory that is unpinned before it is freed: what lies at its address later would pass for pinned."""

    pinned: int | None = None

    def __del__(self) -> None:
        if self.pinned is not None:
            torch.cuda.cudart().cudaHostUnregister(self.pinned)
