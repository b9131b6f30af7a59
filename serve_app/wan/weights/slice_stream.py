"""The bytes of a tensor's slice, read one after another although they lie in the file with gaps between them.

Knows neither names nor dtypes of tensors.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.errors import CheckpointError

_MAX_READ = 8 << 20  # bytes: a checksum is then taken of what is still in the processor's cache


@dataclass(frozen=True)
class ByteRuns:
    """Runs of bytes of equal length and at equal distances in a file, which together are a slice of a tensor.

    Attributes:
        offset: byte of the file at which the first run begins.
        length: bytes of a run.
        stride: bytes from the beginning of a run to the beginning of the next.
        count: number of runs.
    """

    offset: int
    length: int
    stride: int
    count: int

    @classmethod
    def of_slice(cls, shape: Sequence[int], itemsize: int, offset: int, dim: int, start: int, stop: int) -> ByteRuns:
        """Return the runs of the slice `start:stop` along `dim`.

        A whole tensor is a single run; a slice has one run for each index of the dimensions before `dim`.

        Args:
            shape: shape of the whole tensor, which lies in C order.
            itemsize: bytes of a number.
            offset: byte of the file at which the tensor begins.
            dim: dimension along which to slice.
            start: first index of the slice.
            stop: index after the last of the slice.
        """
        inner = math.prod(shape[dim + 1 :]) * itemsize
        if stop - start == shape[dim]:
            length = math.prod(shape) * itemsize
            return cls(offset, length, length, 1)
        return cls(offset + start * inner, (stop - start) * inner, shape[dim] * inner, math.prod(shape[:dim]))


class SliceStream:
    """Reader of the runs of one slice.

    Args:
        file: descriptor of the open file.
        path: appears in error messages.
        runs: what to read.
        checksummed: compute the CRC-32 of the bytes on the way.

    Attributes:
        crc: CRC-32 of the bytes read so far, if `checksummed`.
    """

    def __init__(self, file: int, path: Path, runs: ByteRuns, checksummed: bool) -> None:
        self._file = file
        self._path = path
        self._runs = runs
        self._checksummed = checksummed
        self._left = runs.count if runs.length else 0
        self._offset = runs.offset  # of the next byte to read
        self._end = runs.offset + runs.length  # of the current run
        self.crc = 0

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer with the next bytes of the slice.

        Returns:
            The number of bytes read: fewer than the buffer holds at the end of the slice, and 0 behind it.

        Raises:
            CheckpointError: the file cannot be read or ends too early.
        """
        filled = 0
        while self._left and filled < len(buffer):
            count = min(self._end - self._offset, len(buffer) - filled, _MAX_READ)
            part = buffer[filled : filled + count]
            _pread(self._file, part, self._offset, self._path)
            if self._checksummed:
                self.crc = zlib.crc32(part, self.crc)
            filled += count
            self._offset += count
            if self._offset == self._end:
                self._next_run()
        return filled

    def _next_run(self) -> None:
        self._left -= 1
        self._offset += self._runs.stride - self._runs.length
        self._end = self._offset + self._runs.length


def _pread(file: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file, [view[done:]], offset + done)
        except OSError as error:  # a disk that is broken, a share that is gone
            raise CheckpointError(f"{path}: cannot be read at byte {offset + done}: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{path}: ended at byte {offset + done}, expected {len(view) - done} more")
        done += count
