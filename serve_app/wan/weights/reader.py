"""Safetensors files read slice by slice, so that a process holds what it asked for and nothing else.

Knows the file format (https://huggingface.co/docs/safetensors), but neither models nor parallelism.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from serve_app.errors import CheckpointError
from serve_app.wan.weights.files import read_header, weight_files
from serve_app.wan.weights.slice_stream import ByteRuns, SliceStream

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by the name that headers use."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BUFFER = 8 << 20  # bytes; a multiple of the size of every dtype


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Weights:
    """The tensors of one component by name, over one or many safetensors files.

    Reads with `pread` instead of a memory map. Mapped pages stay resident until the kernel is short of memory, so each
    rank would seem to hold the whole expert, and under a container's limit could. Several threads may read at once.

    Args:
        where: the component's folder, or its only file.
        stem: file name stem in a folder, see `weight_files`.
        checksums: CRC-32 of tensors' bytes by name. A tensor that is read as a whole is compared with it on the way.

    Raises:
        CheckpointError: a file is missing, truncated, or not safetensors.
    """

    def __init__(
        self, where: Path, stem: str = "diffusion_pytorch_model", checksums: Mapping[str, int] | None = None
    ) -> None:
        self.where = where
        self._checksums = checksums or {}
        self._entries: dict[str, _Entry] = {}
        self._open: dict[Path, int] = {}
        self._opening = threading.Lock()
        self._per_thread = threading.local()
        for file in [where] if where.suffix == ".safetensors" else weight_files(where, stem):
            self._entries.update(_entries(file))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and free the buffers. A later read opens them again."""
        self._per_thread = threading.local()
        while self._open:
            os.close(self._open.popitem()[1])

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the file holds the tensor."""
        return self._entries[name].dtype

    def position(self, name: str) -> tuple[str, int]:
        """Return file name and byte at which the tensor begins: reading in this order is one pass over the files."""
        return self._entries[name].file.name, self._entries[name].offset

    def read(
        self,
        name: str,
        dim: int = 0,
        start: int = 0,
        stop: int | None = None,
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
        check: bool = True,
    ) -> torch.Tensor:
        """Return the slice `start:stop` of a tensor along `dim`, on the CPU.

        Only the bytes of the slice are read: in one run along dimension 0, row by row along a later one.

        Args:
            name: name of the tensor.
            dim: dimension along which to slice.
            start: first index of the slice.
            stop: index after the last of the slice; the size of the dimension if not given.
            dtype: dtype of the result; the file's if not given.
            out: memory for the result; contiguous, of the result's shape and dtype.
            check: compare the checksum, where there is one.

        Raises:
            CheckpointError: the file cannot be read or ends too early, or the tensor differs from its checksum.
        """
        entry = self._entries[name]
        shape = list(entry.shape) or [1]
        size = shape[dim]
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise IndexError(f"{name}: slice {start}:{stop} is outside of dimension {dim}, which has {size} entries")
        runs = ByteRuns.of_slice(shape, entry.dtype.itemsize, entry.offset, dim, start, stop)
        shape[dim] = stop - start
        if out is None:
            out = torch.empty(shape, dtype=dtype or entry.dtype)
        checksum = self._checksums.get(name) if check and shape[dim] == size else None
        stream = SliceStream(self._file(entry.file), entry.file, runs, checksum is not None)
        if out.dtype == entry.dtype:
            stream.readinto(_memory(out))
        else:
            self._read_converted(stream, entry.dtype, out.view(-1))
        if checksum is not None and stream.crc != checksum:
            raise CheckpointError(
                f"{entry.file}: the tensor {name!r} has checksum {stream.crc:08x}, expected {checksum:08x}"
            )
        return out if entry.shape else out.view(())

    def _read_converted(self, stream: SliceStream, dtype: torch.dtype, out: torch.Tensor) -> None:
        """Read numbers of type `dtype` into `out`, of one dimension and another dtype.

        They go through a buffer that all reads of a thread share: memory holds the result alone, and is not left with
        holes of the size of the file's tensors.
        """
        buffer = self._conversion_buffer()
        view, written = _memory(buffer), 0
        while count := stream.readinto(view):
            values = buffer[:count].view(dtype)
            out[written : written + len(values)] = values
            written += len(values)

    def _conversion_buffer(self) -> torch.Tensor:
        if not hasattr(self._per_thread, "buffer"):
            self._per_thread.buffer = torch.empty(_BUFFER, dtype=torch.uint8)
        buffer: torch.Tensor = self._per_thread.buffer
        return buffer

    def _file(self, path: Path) -> int:
        with self._opening:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
                if self._checksums and hasattr(os, "posix_fadvise"):
                    # A shard's file is read whole, so the kernel may read far ahead. Where slices are read, it would
                    # also read the gaps between them.
                    os.posix_fadvise(self._open[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return self._open[path]


def header(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """Return the beginning of a safetensors file whose tensors follow one another in this order.

    Args:
        tensors: dtype and shape by name.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight, as the format wants it
    return len(text).to_bytes(8, "little") + text


def _memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, not copied."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _entries(file: Path) -> dict[str, _Entry]:
    return {
        name: _Entry(file, DTYPES[tensor.dtype], tensor.shape, tensor.offset)
        for name, tensor in read_header(file).items()
    }
