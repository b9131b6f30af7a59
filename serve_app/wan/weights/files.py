"""The files of a model folder, read without trusting them: JSON, and the headers of safetensors files.

Reads only headers and sizes of weights, so that a folder of a hundred gigabytes takes milliseconds. Knows no model,
needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.errors import CheckpointError

ITEMSIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of a number by the name of its type in headers (https://huggingface.co/docs/safetensors)."""
_MAX_HEADER = 100 << 20  # bytes; the limit of the format's own reader
# First bytes of the pointers that Git LFS, Xet and git-annex leave in place of a file that was not fetched.
_POINTERS = (b"version https://git-lfs", b"# xet version", b"/annex/objects/", b"../.git/annex/")


@dataclass(frozen=True)
class Tensor:
    """A tensor as its file's header describes it: type, shape, and `offset`, the byte at which it begins."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """Return the content of a file, or its first `most` bytes.

    Raises:
        CheckpointError: the file is missing, is no regular file, cannot be read, or is a pointer of a large-file store.
    """
    try:
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: is a link to {path.readlink()}, which is missing")
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise CheckpointError(f"{path}: is a folder or device, expected a file")
        with path.open("rb") as stream:
            content = stream.read(most)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing, expected a Wan2.2 checkpoint in the diffusers layout") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if content.startswith(_POINTERS):
        raise CheckpointError(f"{path}: is a pointer of a large-file store, expected the file itself; `git lfs pull`")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    data = read_bytes(path)
    if not data.strip():
        raise CheckpointError(f"{path}: is empty, expected JSON")
    try:
        content = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}, expected JSON") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Return the safetensors files of one component.

    Args:
        folder: the component's folder, e.g. `<checkpoint>/transformer`.
        stem: `diffusion_pytorch_model` (diffusers) or `model` (transformers).

    Raises:
        CheckpointError: a file is missing, or the index is not readable.
    """
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if not index.exists():
        if not single.exists() and not single.is_symlink():
            raise CheckpointError(
                f"{single}: is missing, expected the weights of `{folder.name}` there (or {index.name})"
            )
        return [single]
    if single.exists() and single.name not in _weight_map(index).values():
        # The libraries do not agree on which of the two counts.
        raise CheckpointError(f"{single}: is there beside {index.name}, which does not name it; expected one of both")
    files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    for file in files:
        if not file.exists() and not file.is_symlink():
            raise CheckpointError(
                f"{file}: is missing, expected the weights of `{folder.name}` there (named by {index.name})"
            )
    return files


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Return all tensors of one component by name.

    Args:
        folder: see `weight_files`.
        stem: see `weight_files`.

    Raises:
        CheckpointError: a file is missing or damaged, two files hold the same tensor, or the index disagrees with them.
    """
    found: dict[str, Tensor] = {}
    for file in weight_files(folder, stem):
        for name, tensor in read_header(file).items():
            if name in found:
                raise CheckpointError(f"{file}: holds the tensor {name!r}, expected it once: {found[name].file.name}")
            found[name] = tensor
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        named = _weight_map(index)
        for name, holder in named.items():
            if name not in found or found[name].file.name != holder:
                raise CheckpointError(f"{folder / holder}: lacks the tensor {name!r}, which {index.name} places there")
        for name, tensor in found.items():
            if name not in named:
                raise CheckpointError(f"{tensor.file}: holds the tensor {name!r}, which {index.name} does not name")
    return found


def check_loading(
    folder: Path, loading: dict[str, Any], is_ignored: Callable[[str], bool] = lambda name: False
) -> None:
    """Check a library's report on loading weights: it draws tensors that it lacks, and ignores those it has no use for.

    Args:
        folder: appears in error messages.
        loading: the report that `from_pretrained` returns with `output_loading_info`.
        is_ignored: returns whether a tensor may be left over.

    Raises:
        CheckpointError: a tensor has no place in the model, is missing, or has another shape.
    """
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        # Names of mismatched tensors come with both shapes.
        names = [name if isinstance(name, str) else name[0] for name in loading[kind]]
        if kind == "unexpected_keys":
            names = [name for name in names if not is_ignored(name)]
        if names:
            what = kind.removesuffix("_keys")
            raise CheckpointError(f"{folder}: the tensor {min(names)!r} is {what} when it is loaded (of {len(names)})")
    if loading.get("error_msgs"):
        raise CheckpointError(f"{folder}: {' '.join(str(loading['error_msgs'][0]).split())[:200]}")


def read_header(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        CheckpointError: the file is not safetensors, was not copied completely, or its header does not fit its size.
    """
    start = read_bytes(file, 64)
    total = file.stat().st_size
    length = int.from_bytes(start[:8], "little")
    if total < 8 or not 2 <= length <= _MAX_HEADER:
        raise CheckpointError(f"{file}: is not a safetensors file (a header of {length} bytes in {total})")
    if 8 + length > total:
        raise CheckpointError(
            f"{file}: has {total} bytes, expected more than {8 + length}; it was not copied completely"
        )
    try:
        header = json.loads(read_bytes(file, 8 + length)[8:].decode("utf-8"), object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: has a header that cannot be read ({error!r})"[:300]) from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end and 0 not in tensor.shape:
            raise CheckpointError(f"{file}: the tensor {name!r} begins at byte {tensor.offset}, expected {end}")
        end += math.prod(tensor.shape) * ITEMSIZES[tensor.dtype]
    if end != total:
        copied = "; it was not copied completely" if total < end else ""
        raise CheckpointError(f"{file}: has {total} bytes, expected {end}{copied}")
    return tensors


def _tensor(file: Path, name: str, entry: dict[str, Any], start: int) -> Tensor:
    shape: tuple[int, ...] = tuple(entry["shape"])
    dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
    if dtype not in ITEMSIZES:
        raise CheckpointError(
            f"{file}: the tensor {name!r} has type {str(dtype)[:40]}, expected one of {', '.join(ITEMSIZES)}"
        )
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise TypeError(f"{name!r} has shape {shape} and offsets {begin}, {end}")
    if end - begin != math.prod(shape) * ITEMSIZES[dtype]:
        raise CheckpointError(
            f"{file}: the tensor {name!r} has {end - begin} bytes, expected "
            f"{math.prod(shape) * ITEMSIZES[dtype]} for {dtype} {list(shape)}"
        )
    return Tensor(file, dtype, shape, start + begin)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) and name for name in found.values()):
        raise CheckpointError(f"{index}: is not a safetensors index, expected JSON with a `weight_map`")
    for name in found.values():
        if "/" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names the file {name[:80]!r}, expected safetensors files beside it")
    return found
