"""Writes a prepared folder: each rank's shard of the experts, once, so that no start has to cut and convert again.

A file is written under another name, tensor by tensor, and renamed when the disk has it; then the manifest names it. A
process that is killed leaves nothing that looks complete, and the next call goes on after the last complete file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch

from serve_app.errors import CheckpointError, ConfigError
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.weights.checkpoint import Checkpoint, Expert
from serve_app.wan.weights.reader import Weights, header
from serve_app.wan.weights.shard_spec import ShardSlice, shard_shapes, shard_slices
from serve_app.wan.weights.sharded import FORMAT, MANIFEST, Manifest, Shard, Source, sample_of, shard_name, sources

Watch = Callable[[str, int, int], None]
"""Told what is being done, how many more bytes of it are done, and how many there are to read and write in all."""

_CHUNK = 8 << 20
_SPARE = 4 << 20  # bytes of disk for the manifest, twice while it is replaced, and for the file system's own


@dataclass(frozen=True)
class Written:
    """What a call did: files that it wrote, their bytes, and files that were there."""

    written: int
    bytes: int
    kept: int


@dataclass(frozen=True)
class _ShardTask:
    """A file to write."""

    expert: Expert
    name: str
    shard_slices: list[ShardSlice]

    @cached_property
    def header(self) -> bytes:
        """All of the file before its tensors."""
        return header({piece.name: (piece.dtype, piece.shape) for piece in self.shard_slices})

    @cached_property
    def size(self) -> int:
        return len(self.header) + sum(piece.nbytes for piece in self.shard_slices)


def prepare(
    checkpoint: Checkpoint,
    out: Path,
    tensor: int,
    dtype: str,
    experts: Sequence[Expert] | None = None,
    verify: bool = False,
    watch: Watch = lambda what, count, total: None,
) -> Written:
    """Write the shards of a model that are not in `out` yet.

    The memory of the process grows by the largest tensor of a shard and little more.

    Args:
        tensor: ranks of a group.
        dtype: `float32` or `bfloat16`.
        experts: which ones; all that the model has if not given.
        verify: read the model's files and the shards that are there again and compare their hashes, instead of sizes
            and samples. Shards that differ are written again.
        watch: is told of the progress.

    Raises:
        ConfigError: the model cannot be cut into so many shards, the disk is too small or fails, or another process
            prepares into the same folder.
        CheckpointError: the weights do not match their configuration, or `out` was prepared from something else.
    """
    for expert in checkpoint.experts:
        Mesh(tensor=tensor).check_fits(checkpoint.expert_config(expert), tensor_option="--tensor")
    jobs = [
        job
        for expert in dict.fromkeys(experts or checkpoint.experts)
        for job in _jobs(checkpoint, expert, tensor, dtype)
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            try:
                manifest = Manifest.read(out)
            except FileNotFoundError:
                manifest = Manifest(
                    format=FORMAT,
                    revision=checkpoint.experts_revision,
                    tensor=tensor,
                    dtype=dtype,
                    sources={},
                    files={},
                )
            manifest.check(out, checkpoint, tensor, dtype)
            return _Preparation(checkpoint, out, manifest, jobs, verify, watch).run()
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: {error.strerror}") from error


class _Preparation:
    """One call's work on a folder that it has to itself."""

    def __init__(
        self, checkpoint: Checkpoint, out: Path, manifest: Manifest, jobs: list[_ShardTask], verify: bool, watch: Watch
    ) -> None:
        self._checkpoint = checkpoint
        self._out = out
        self._manifest = manifest
        self._watch = watch
        self._left = [job for job in jobs if not self._is_there(job)]
        kept = [job for job in jobs if job not in self._left]
        self._kept = len(kept)
        self._again = kept if verify else []
        experts = dict.fromkeys(job.expert for job in jobs)
        files = [path for expert in experts for path in sources(checkpoint, expert)]
        self._sources = [path for path in files if verify or self._relative(path) not in manifest.sources]
        self._total = sum(path.stat().st_size for path in self._sources)
        self._total += sum(job.size for job in (*self._again, *self._left))

    def run(self) -> Written:
        self._check_disk()
        for path in self._sources:
            self._hash_source(path)
        for job in self._again:
            self._verify(job)
        for job in self._left:
            with Weights(self._checkpoint.folder / job.expert) as weights:
                shard = _write(job, weights, self._out / job.name, self._told(job.name))
            self._note(files=dict(sorted({**self._manifest.files, job.name: shard}.items())))
        return Written(len(self._left), sum(job.size for job in self._left), self._kept)

    def _is_there(self, job: _ShardTask) -> bool:
        path, shard = self._out / job.name, self._manifest.files.get(job.name)
        return shard is not None and path.is_file() and path.stat().st_size == shard.size == job.size

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._checkpoint.folder).as_posix()

    def _check_disk(self) -> None:
        need = sum(job.size for job in self._left)
        # Left by a process that was killed: what replaces them takes their space.
        stale = sum(path.stat().st_size for job in self._left if (path := _partial(self._out / job.name)).is_file())
        free = shutil.disk_usage(self._out).free + stale
        if need and need + _SPARE > free:
            raise ConfigError(
                f"OUT has value {str(self._out)!r} with {free / 1e6:.0f} MB free, "
                f"expected {(need + _SPARE) / 1e6:.0f} MB for the {len(self._left)} files to write"
            )

    def _hash_source(self, path: Path) -> None:
        name = self._relative(path)
        digest = _sha256(path, self._told(f"hash {name}"))
        source = Source(size=path.stat().st_size, sha256=digest, sample=sample_of(path))
        if self._manifest.sources.get(name, source) != source:
            raise CheckpointError(
                f"{path}: has other weights than the file that {self._out / MANIFEST} was prepared from"
            )
        self._note(sources={**self._manifest.sources, name: source})

    def _verify(self, job: _ShardTask) -> None:
        """Remove a file that is not what was written, which frees its space for the next try."""
        path = self._out / job.name
        if _sha256(path, self._told(f"verify {job.name}")) != self._manifest.files[job.name].sha256:
            self._note(files={name: shard for name, shard in self._manifest.files.items() if name != job.name})
            path.unlink()
            self._left.append(job)
            self._kept -= 1
            self._total += job.size

    def _note(self, **changes: object) -> None:
        self._manifest = self._manifest.model_copy(update=changes)
        with _complete(self._out / MANIFEST) as file:
            file.write(self._manifest.model_dump_json(indent=1).encode())

    def _told(self, what: str) -> Callable[[int], None]:
        return lambda count: self._watch(what, count, self._total)


def _jobs(checkpoint: Checkpoint, expert: Expert, tensor: int, dtype: str) -> Iterator[_ShardTask]:
    shapes = shard_shapes(checkpoint, expert, tensor)
    with Weights(checkpoint.folder / expert) as weights:
        for rank in range(tensor):
            parts = shard_slices(shapes, weights, rank, tensor, getattr(torch, dtype))
            # The wider elements first, so that every tensor lies at a multiple of its elements' size.
            parts.sort(key=lambda part: -part.dtype.itemsize)
            yield _ShardTask(expert, shard_name(expert, rank, tensor), parts)


def _write(job: _ShardTask, weights: Weights, path: Path, told: Callable[[int], None]) -> Shard:
    """Write a rank's file; memory holds one of its tensors at a time."""
    path.parent.mkdir(exist_ok=True)
    tensors = {}
    with _complete(path) as file:
        file.write(job.header)
        digest = hashlib.sha256(job.header)
        told(len(job.header))
        for piece in job.shard_slices:
            tensor = weights.read(piece.name, piece.dim, piece.start, piece.stop, piece.dtype)
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            file.write(data)
            digest.update(data)
            tensors[piece.name] = zlib.crc32(data)
            told(len(data))
    return Shard(size=job.size, sha256=digest.hexdigest(), header=zlib.crc32(job.header), tensors=tensors)


@contextmanager
def _complete(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` when all of it is on the disk, and not at all otherwise."""
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name as well
    finally:
        os.close(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse a second process on the same folder, which would replace what the first one notes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"OUT has value {str(folder)!r}, into which another process is preparing") from None
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP):  # network file systems without such locks
                raise
        yield
    finally:
        os.close(handle)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _sha256(path: Path, told: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            told(count)
    return digest.hexdigest()
