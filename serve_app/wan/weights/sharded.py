"""A folder that `wan-serve prepare` wrote: for each expert one safetensors file per rank, and what they were made from.

Needs no torch to say whether a folder fits, so that a deployment which does not is refused before anything starts.
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
"""Of the folder. It grows whenever the files or the manifest change; only the current one is read."""
AGAIN = "prepare the model again, into an empty folder"

MANIFEST = "manifest.json"
_SAMPLES, _SAMPLE_BYTES = 16, 4096


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Part):
    """A weight file of the model: `sha256` of all of it, `sample` as `sample_of` returns it."""

    size: int
    sha256: str
    sample: str


class Shard(_Part):
    """A file that was written: `sha256` of all of it, CRC-32 of its header and of each tensor's bytes.

    The hash is for people and tools; what loads compares the checksums, which cost less and come with the reading.
    """

    size: int
    sha256: str
    header: int
    tensors: dict[str, int]


class Manifest(_Part):
    """What a folder holds. Files that are not in it do not count: it is written anew after each one is complete."""

    format: int
    revision: str
    tensor: int
    dtype: str
    sources: dict[str, Source]
    files: dict[str, Shard]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it cannot be read, or is of another format.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path}: cannot be read as JSON: {error}; {AGAIN}") from None
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise CheckpointError(f"{path}: has format {found!r}, expected {FORMAT}; {AGAIN}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {AGAIN}") from None

    def check_fits(self, folder: Path, checkpoint: Checkpoint, tensor: int, dtype: str) -> None:
        """Whether the folder is of this model, number of ranks and dtype.

        Raises:
            CheckpointError: it is not.
        """
        path = folder / MANIFEST
        for key, found, expected, whose in (
            ("tensor", self.tensor, tensor, ""),
            ("dtype", self.dtype, dtype, ""),
            ("revision", self.revision, checkpoint.experts_revision, f", that of {checkpoint.folder}"),
        ):
            if key == "revision" and found == checkpoint.revision:
                continue  # as older versions wrote it: of the whole folder
            if found != expected:
                raise CheckpointError(f"{path}: was prepared with {key} {found}, expected {expected}{whose}")
        for name, source in self.sources.items():
            # The revision says nothing of weights of the same names and shapes, such as those of a fine-tuned model.
            if sample_of(checkpoint.folder / name) != source.sample:
                raise CheckpointError(
                    f"{checkpoint.folder / name}: has other weights than the file that {path} was prepared from"
                )


class ShardedCheckpoint:
    """A prepared folder that fits a deployment.

    Args:
        folder: with the manifest.
        checkpoint: the model that it has to be made from.
        tensor: ranks of a group.
        dtype: `float32` or `bfloat16`.

    Raises:
        CheckpointError: it does not fit; the message names the file, what it has and what was expected.
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
        """Whether the file of a rank is there and complete: its size and its header. The rest is seen on reading.

        Returns:
            Its path.

        Raises:
            CheckpointError: it is not.
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
        """A reader of a rank's file, which it has to itself. Damage in a tensor is an error when that is read.

        Raises:
            CheckpointError: the file is not there or not complete.
        """
        from serve_app.wan.weights.reader import Weights  # only now: who checks a folder needs no torch

        path = self.check_shard(expert, rank)
        checksums = self.manifest.files[shard_name(expert, rank, self.tensor)].tensors
        weights = Weights(path, checksums=checksums)
        if weights.names() != set(checksums):
            raise CheckpointError(f"{self.folder / MANIFEST}: names other tensors than {path} has")
        return weights


def shard_name(expert: Expert, rank: int, size: int) -> str:
    """The file of a rank, below the folder."""
    return f"{expert}/rank-{rank}-of-{size}.safetensors"


def sources(checkpoint: Checkpoint, expert: Expert) -> list[Path]:
    """The weight files that an expert's shards are made from."""
    return weight_files(checkpoint.folder / expert, "diffusion_pytorch_model")


def sample_of(path: Path) -> str:
    """A hash of the size, the first and last pages and some between: other weights differ nearly everywhere."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            last = max(0, size - _SAMPLE_BYTES)
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, last * index // (_SAMPLES - 1)))
    return digest.hexdigest()


def header_crc32(path: Path) -> int:
    """CRC-32 of a safetensors file's beginning, up to its tensors."""
    with path.open("rb") as file:
        length = file.read(8)
        # A damaged length may be anything; what a header can have at most is a bound to what is read.
        return zlib.crc32(length + file.read(min(int.from_bytes(length, "little"), 100 << 20)))
