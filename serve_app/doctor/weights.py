"""Fingerprints of the weight files of a host, to compare hosts with each other and with what was published."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from serve_app.wan.weights.sharded import sample_of

_CHUNK = 1 << 22
# Where `hf download --local-dir` notes of each file what the Hub has.
_NOTES = Path(".cache/huggingface/download")


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints of the files of some folders.

    Attributes:
        files: a digest of each file, by its path.
        missing: folders that are not there.
        wrong: files whose content is not what the Hub has published under their name.
    """

    files: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def fingerprints(folders: list[Path], whole: bool) -> Fingerprints:
    """Return the fingerprints of all files in some folders.

    Args:
        folders: the model's folder, and that of the sharded checkpoint.
        whole: read every byte, and compare with the Hub's checksums if a download has left them. Else the size of a
            file and samples of its content count, which takes a second for a hundred gigabytes.
    """
    found = Fingerprints()
    for folder in folders:
        if not folder.is_dir():
            found.missing.append(str(folder))
            continue
        for path in _files(folder):
            digest = _whole(path) if whole else sample_of(path)
            found.files[str(path)] = digest
            published = _published(folder, path)
            if whole and published is not None and published != digest:
                found.wrong.append(str(path))
    return found


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def _whole(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _published(folder: Path, path: Path) -> str | None:
    """Return the SHA-256 that the Hub has of a large file; None if nothing is known."""
    note = folder / _NOTES / f"{path.relative_to(folder)}.metadata"
    try:
        lines = note.read_text().splitlines()
    except OSError:
        return None
    # Of small files the Hub's tag is another kind of hash, of 40 digits.
    return lines[1] if len(lines) > 1 and len(lines[1]) == 64 else None
