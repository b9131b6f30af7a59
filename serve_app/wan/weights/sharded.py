"""The sharded checkpoint: a folder that `wan-serve prepare` wrote, with one safetensors file per expert and rank.

Checks of a folder need no torch, so that a deployment which it does not fit is refused before anything starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from serve_app.errors import CheckpointError
from serve_app.wan.weights.checkpoint import Checkpoint, Expert
from serve_app.wan.weights.files import weight_files

if TYPE_CHECKING:
    from serve_app.wan.weights.reader import Weights

FORMAT = 2
"""Version of the folder's format. It grows whenever files or manifest change; only the current version is read."""
REMEDY = "prepare the model again, into an empty folder"

MANIFEST = "manifest.json"
_SAMPLES, _SAMPLE_BYTES = 16, 4096


class _ManifestPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_ManifestPart):
    """A weight file of the model: its size, its `sha256`, and its `sample`, see `sample_of`."""

    size: int
    sha256: str
    sample: str


class Shard(_ManifestPart):
    """A shard's file: its size, its `sha256`, and the CRC-32 of its header and of each tensor's bytes.

    The hash is for people and tools. Loading compares the checksums, which cost less and are computed while reading.
    """

    size: int
    sha256: str
    header: int
    tensors: dict[str, int]


class Manifest(_ManifestPart):
    """Contents of a folder. It is written anew after each complete file; files that it does not name do not count."""

    format: int
    revision: str
    tensor: int
    dtype: str
    sources: dict[str, Source]
    files: dict[str, Shard]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            FileNotFoundError: the folder has no manifest.
            CheckpointError: the manifest cannot be read, or has another format.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}; {REMEDY}") from None
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise CheckpointError(f"{path}: has format {found!r}, expected {FORMAT}; {REMEDY}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {REMEDY}") from None

    def check_fits(self, folder: Path, checkpoint: Checkpoint, tensor: int, dtype: str) -> None:
        """Check that the folder was made from this model, for this number of ranks and dtype.

        Args:
            folder: folder of the manifest.
            checkpoint: the model.
            tensor: number of ranks that share the weights.
            dtype: `float32` or `bfloat16`.

        Raises:
            CheckpointError: the folder does not fit.
        """
        path = folder / MANIFEST
        for key, found, expected, whose in (
            ("tensor", self.tensor, tensor, ""),
            ("dtype", self.dtype, dtype, ""),
            ("revision", self.revision, checkpoint.experts_revision, f", that of {checkpoint.folder}"),
        ):
            if key == "revision" and found == checkpoint.revision:
                continue  # older versions wrote the revision of the whole folder
            if found != expected:
                raise CheckpointError(f"{path}: was prepared with {key} {found}, expected {expected}{whose}")
        for name, source in self.sources.items():
            # Weights of the same names and shapes, such as those of a fine-tuned model, have the same revision.
            if sample_of(checkpoint.folder / name) != source.sample:
                raise CheckpointError(
                    f"{checkpoint.folder / name}: has other weights than the file that {path} was prepared from"
                )


class ShardedCheckpoint:
    """A folder of shards that fits a deployment.

    Args:
        folder: contains the manifest.
        checkpoint: the model that the shards must be made from.
        tensor: number of ranks that share the weights.
        dtype: `float32` or `bfloat16`.

    Attributes:
        manifest: contents of the folder.

    Raises:
        CheckpointError: the folder does not fit; the message names the file, its value and the expected one.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, tensor: int, dtype: str) -> None:
        self.folder = Path(folder)
        self.tensor = tensor
        try:
            self.manifest = Manifest.read(self.folder)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.folder / MANIFEST}: is missing, expected a folder that `wan-serve prepare` wrote"
            ) from None
        self.manifest.check_fits(self.folder, checkpoint, tensor, dtype)

    def check_shard(self, expert: Expert, rank: int) -> Path:
        """Check size and header of a rank's file, and return its path. Tensors are checked when they are read.

        Raises:
            CheckpointError: the file is missing, incomplete or damaged.
        """
        name = shard_name(expert, rank, self.tensor)
        path, shard = self.folder / name, self.manifest.files.get(name)
        if shard is None:
            raise CheckpointError(f"{path}: is not in {MANIFEST}, expected it there; let `wan-serve prepare` finish")
        try:
            size, header = path.stat().st_size, header_crc32(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is missing, expected the shard of rank {rank}") from None
        if size != shard.size:
            raise CheckpointError(f"{path}: has {size} bytes, expected {shard.size}; it was not copied completely")
        if header != shard.header:
            raise CheckpointError(f"{path}: has a header of checksum {header:08x}, expected {shard.header:08x}")
        return path

    def weights(self, expert: Expert, rank: int) -> Weights:
        """Return a reader of a rank's file. Reading a damaged tensor raises an error.

        Raises:
            CheckpointError: the file is missing, incomplete or damaged.
        """
        from serve_app.wan.weights.reader import Weights  # here, because checks of a folder need no torch

        path = self.check_shard(expert, rank)
        checksums = self.manifest.files[shard_name(expert, rank, self.tensor)].tensors
        weights = Weights(path, checksums=checksums)
        if weights.names() != set(checksums):
            raise CheckpointError(f"{self.folder / MANIFEST}: names other tensors than {path} has")
        return weights


def shard_name(expert: Expert, rank: int, size: int) -> str:
    """Return the name of a rank's file, relative to the folder."""
    return f"{expert}/rank-{rank}-of-{size}.safetensors"


def sources(checkpoint: Checkpoint, expert: Expert) -> list[Path]:
    """Return the weight files that an expert's shards are made from."""
    return weight_files(checkpoint.folder / expert, "diffusion_pytorch_model")


def sample_of(path: Path) -> str:
    """Return a hash of a file's size, first and last page and some between: other weights differ nearly everywhere."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            last = max(0, size - _SAMPLE_BYTES)
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, last * index // (_SAMPLES - 1)))
    return digest.hexdigest()


def header_crc32(path: Path) -> int:
    """Return the CRC-32 of a safetensors file's bytes before its tensors."""
    with path.open("rb") as file:
        length = file.read(8)
        # A damaged length may be any number: read no more than the longest header.
        return zlib.crc32(length + file.read(min(int.from_bytes(length, "little"), 100 << 20)))
