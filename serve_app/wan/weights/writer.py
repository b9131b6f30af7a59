"""Writer of sharded checkpoints: each rank's shard of the experts, so that no start has to cut and convert again.

A file is written under another name, tensor by tensor, and renamed when it is on the disk; then it is added to the
manifest. A killed process leaves nothing that looks complete, and the next call goes on after the last complete file.
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
"""Progress callback `(what, count, total)`: `count` more bytes of `what` are done, of `total` bytes in all."""

_CHUNK = 8 << 20
_SPARE = 4 << 20  # bytes of disk for the manifest, twice while it is replaced, and for the file system


@dataclass(frozen=True)
class Written:
    """Result of a call: files that it wrote, their bytes, and files that were there before."""

    written: int
    bytes: int
    kept: int


@dataclass(frozen=True)
class _ShardTask:
    """A shard's file to write."""

    expert: Expert
    name: str
    shard_slices: list[ShardSlice]

    @cached_property
    def header(self) -> bytes:
        """Bytes of the file before its tensors."""
        return header({part.name: (part.dtype, part.shape) for part in self.shard_slices})

    @cached_property
    def size(self) -> int:
        return len(self.header) + sum(part.nbytes for part in self.shard_slices)


def prepare(
    checkpoint: Checkpoint,
    out: Path,
    tensor: int,
    dtype: str,
    experts: Sequence[Expert] | None = None,
    verify: bool = False,
    watch: Watch = lambda what, count, total: None,
) -> Written:
    """Write those shards of a model that are not in `out` yet.

    The memory of the process grows by the largest tensor of a shard and little more.

    Args:
        checkpoint: the model.
        out: folder of the sharded checkpoint.
        tensor: number of ranks that share the weights.
        dtype: `float32` or `bfloat16`.
        experts: experts to write; all that the model has if not given.
        verify: compare the hashes of the model's files and of the shards in `out`, instead of sizes and samples. Shards
            that differ are written again.
        watch: called with the progress.

    Raises:
        ConfigError: the model cannot be cut into so many shards, the disk is too small or fails, or another process
            writes into the same folder.
        CheckpointError: the weights do not match their configuration, or `out` was made from another model.
    """
    for expert in checkpoint.experts:
        Mesh(tensor=tensor).check_fits(checkpoint.expert_config(expert), tensor_option="--tensor")
    tasks = [
        task
        for expert in dict.fromkeys(experts or checkpoint.experts)
        for task in _tasks(checkpoint, expert, tensor, dtype)
    ]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
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
            manifest.check_fits(out, checkpoint, tensor, dtype)
            return _Preparation(checkpoint, out, manifest, tasks, verify, watch).run()
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: {error.strerror}") from error


class _Preparation:
    """One call of `prepare`, which has the folder to itself."""

    def __init__(
        self, checkpoint: Checkpoint, out: Path, manifest: Manifest, tasks: list[_ShardTask], verify: bool, watch: Watch
    ) -> None:
        self._checkpoint = checkpoint
        self._out = out
        self._manifest = manifest
        self._watch = watch
        self._to_write = [task for task in tasks if not self._is_complete(task)]
        kept = [task for task in tasks if task not in self._to_write]
        self._kept = len(kept)
        self._to_verify = kept if verify else []
        experts = dict.fromkeys(task.expert for task in tasks)
        files = [path for expert in experts for path in sources(checkpoint, expert)]
        self._to_hash = [path for path in files if verify or self._relative(path) not in manifest.sources]
        self._total = sum(path.stat().st_size for path in self._to_hash)
        self._total += sum(task.size for task in (*self._to_verify, *self._to_write))

    def run(self) -> Written:
        self._check_disk()
        for path in self._to_hash:
            self._hash_source(path)
        for task in self._to_verify:
            self._verify(task)
        for task in self._to_write:
            with Weights(self._checkpoint.folder / task.expert) as weights:
                shard = _write(task, weights, self._out / task.name, self._progress_of(task.name))
            self._update_manifest(files=dict(sorted({**self._manifest.files, task.name: shard}.items())))
        return Written(len(self._to_write), sum(task.size for task in self._to_write), self._kept)

    def _is_complete(self, task: _ShardTask) -> bool:
        path, shard = self._out / task.name, self._manifest.files.get(task.name)
        return shard is not None and path.is_file() and path.stat().st_size == shard.size == task.size

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._checkpoint.folder).as_posix()

    def _check_disk(self) -> None:
        need = sum(task.size for task in self._to_write)
        # Files of a killed process are replaced, which frees their space.
        stale = sum(
            path.stat().st_size for task in self._to_write if (path := _partial(self._out / task.name)).is_file()
        )
        free = shutil.disk_usage(self._out).free + stale
        if need and need + _SPARE > free:
            raise ConfigError(
                f"OUT has value {str(self._out)!r} with {free / 1e6:.0f} MB free, "
                f"expected {(need + _SPARE) / 1e6:.0f} MB for the {len(self._to_write)} files to write"
            )

    def _hash_source(self, path: Path) -> None:
        name = self._relative(path)
        digest = _sha256(path, self._progress_of(f"hash {name}"))
        source = Source(size=path.stat().st_size, sha256=digest, sample=sample_of(path))
        if self._manifest.sources.get(name, source) != source:
            raise CheckpointError(
                f"{path}: has other weights than the file that {self._out / MANIFEST} was prepared from"
            )
        self._update_manifest(sources={**self._manifest.sources, name: source})

    def _verify(self, task: _ShardTask) -> None:
        """Remove a file whose content has changed, which frees its space, and plan to write it again."""
        path = self._out / task.name
        if _sha256(path, self._progress_of(f"verify {task.name}")) != self._manifest.files[task.name].sha256:
            self._update_manifest(
                files={name: shard for name, shard in self._manifest.files.items() if name != task.name}
            )
            path.unlink()
            self._to_write.append(task)
            self._kept -= 1
            self._total += task.size

    def _update_manifest(self, **changes: object) -> None:
        self._manifest = self._manifest.model_copy(update=changes)
        with _appearing_complete(self._out / MANIFEST) as file:
            file.write(self._manifest.model_dump_json(indent=1).encode())

    def _progress_of(self, what: str) -> Callable[[int], None]:
        return lambda count: self._watch(what, count, self._total)


def _tasks(checkpoint: Checkpoint, expert: Expert, tensor: int, dtype: str) -> Iterator[_ShardTask]:
    shapes = shard_shapes(checkpoint, expert, tensor)
    with Weights(checkpoint.folder / expert) as weights:
        for rank in range(tensor):
            parts = shard_slices(shapes, weights, rank, tensor, getattr(torch, dtype))
            # Wider dtypes first, so that every tensor lies at a multiple of its dtype's size.
            parts.sort(key=lambda part: -part.dtype.itemsize)
            yield _ShardTask(expert, shard_name(expert, rank, tensor), parts)


def _write(task: _ShardTask, weights: Weights, path: Path, progress: Callable[[int], None]) -> Shard:
    """Write a rank's file. Memory holds one of its tensors at a time."""
    path.parent.mkdir(exist_ok=True)
    tensors = {}
    with _appearing_complete(path) as file:
        file.write(task.header)
        digest = hashlib.sha256(task.header)
        progress(len(task.header))
        for part in task.shard_slices:
            tensor = weights.read(part.name, part.dim, part.start, part.stop, part.dtype)
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            file.write(data)
            digest.update(data)
            tensors[part.name] = zlib.crc32(data)
            progress(len(data))
    return Shard(size=task.size, sha256=digest.hexdigest(), header=zlib.crc32(task.header), tensors=tensors)


@contextmanager
def _appearing_complete(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that appears at `path` when all of it is on the disk, and not at all otherwise."""
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
        os.fsync(folder)  # so that the new name is on the disk as well
    finally:
        os.close(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against a second process, which would overwrite the first one's manifest."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"OUT has value {str(folder)!r}, into which another process is preparing") from None
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP):  # network file systems that have no locks
                raise
        yield
    finally:
        os.close(handle)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _sha256(path: Path, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
    return digest.hexdigest()
