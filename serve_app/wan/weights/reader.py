"""Safetensors files read slice by slice, so that a process holds what it asked for and nothing else.

Knows the file format (https://huggingface.co/docs/safetensors), but neither models nor parallelism.
"""

from __future__ import annotations

import json
import math
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from serve_app.errors import CheckpointError
from serve_app.wan.weights.files import read_header, weight_files

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
"""By the name that headers use."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BUFFER = 8 << 20  # bytes; a multiple of every element's size


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class Weights:
    """The tensors of one component, by name, over one or many safetensors files.

    Reads with `pread` instead of a memory map: mapped pages stay resident until the kernel is short of memory, so each
    rank would seem to, and under a container's limit could, hold the whole expert. Several threads may read at once.

    Args:
        where: the component's folder, or its only file.
        stem: of the files in a folder, see `weight_files`.
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
        self._of_thread = threading.local()
        for file in [where] if where.suffix == ".safetensors" else weight_files(where, stem):
            self._entries.update(_header(file))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and free the buffers. A later read opens them again."""
        self._of_thread = threading.local()
        while self._open:
            os.close(self._open.popitem()[1])

    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """As which the file holds the tensor."""
        return self._entries[name].dtype

    def position(self, name: str) -> tuple[str, int]:
        """Where the tensor begins: reading in this order is one pass over the files."""
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
        """The slice `start:stop` of a tensor along `dim`, on the CPU.

        Only the bytes of the slice are read: in one piece along dimension 0, row by row along a later one.

        Args:
            dtype: of the result, that of the file if not given. Conversion goes through a buffer that all reads of a
                thread share, so that memory holds the result alone, and is not left in holes of the size of the file's
                tensors.
            out: where to; contiguous, of the result's shape and dtype.
            check: whether to compare the checksum, where there is one.

        Raises:
            CheckpointError: the file cannot be read or ends too early, or the tensor is not what its checksum says.
        """
        entry = self._entries[name]
        shape = list(entry.shape) or [1]
        size = shape[dim]
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise IndexError(f"{name}: slice {start}:{stop} is outside of dimension {dim}, which has {size} entries")
        shape[dim] = stop - start
        inner = math.prod(shape[dim + 1 :]) * entry.dtype.itemsize
        # A whole tensor is one run of bytes, a slice has one run for each index of the dimensions before it.
        runs = math.prod(shape[:dim]) if stop - start < size else 1
        length = math.prod(shape) * entry.dtype.itemsize // max(1, runs)
        if out is None:
            out = torch.empty(shape, dtype=dtype or entry.dtype)
        flat = out.view(-1)
        # Without a conversion the result itself is the buffer.
        buffer = flat.view(torch.uint8) if out.dtype == entry.dtype else self._conversion_buffer()
        view = memoryview(buffer.numpy().data)
        file = self._file(entry.file)
        filled = written = crc = 0
        checksum = self._checksums.get(name) if check and stop - start == size else None
        for run in range(runs):
            offset = entry.offset + (run * size + start) * inner
            done = 0
            while done < length:
                count = min(length - done, len(view) - filled, _BUFFER)
                _fill(file, view[filled : filled + count], offset + done, entry.file)
                if checksum is not None:
                    crc = zlib.crc32(view[filled : filled + count], crc)
                done, filled = done + count, filled + count
                if out.dtype != entry.dtype and (filled == len(view) or (run == runs - 1 and done == length)):
                    values = buffer[:filled].view(entry.dtype)
                    flat[written : written + len(values)] = values
                    written, filled = written + len(values), 0
        if checksum is not None and crc != checksum:
            raise CheckpointError(f"{entry.file}: the tensor {name!r} has checksum {crc:08x}, expected {checksum:08x}")
        return out if entry.shape else out.view(())

    def _conversion_buffer(self) -> torch.Tensor:
        if not hasattr(self._of_thread, "buffer"):
            self._of_thread.buffer = torch.empty(_BUFFER, dtype=torch.uint8)
        buffer: torch.Tensor = self._of_thread.buffer
        return buffer

    def _file(self, path: Path) -> int:
        with self._opening:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
                if self._checksums and hasattr(os, "posix_fadvise"):
                    # All of it is wanted, so the kernel may read far ahead. Of slices that would also be what lies
                    # between.
                    os.posix_fadvise(self._open[path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return self._open[path]


def header(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """What a safetensors file begins with whose tensors, of these dtypes and shapes, follow one another."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight, as the format wants it
    return len(text).to_bytes(8, "little") + text


def _fill(file: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file, [view[done:]], offset + done)
        except OSError as error:  # a disk that is broken, a share that is gone
            raise CheckpointError(f"{path}: cannot be read at byte {offset + done}: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{path}: ended at byte {offset + done}, expected {len(view) - done} more")
        done += count


def _header(file: Path) -> dict[str, _Entry]:
    return {
        name: _Entry(file, DTYPES[tensor.dtype], tensor.shape, tensor.offset)
        for name, tensor in read_header(file).items()
    }
