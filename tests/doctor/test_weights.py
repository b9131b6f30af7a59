from __future__ import annotations

import hashlib
from pathlib import Path

from serve_app.doctor.weights import fingerprints


def folder_of(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def test_a_byte_between_the_samples_is_found_by_all_bytes_only(tmp_path: Path) -> None:
    content = bytearray(range(256)) * 4096
    before = folder_of(tmp_path / "a", weights=bytes(content), config=b"{}")
    content[6000] ^= 1  # beyond the first sample of 4096 bytes, far before the second
    after = folder_of(tmp_path / "b", weights=bytes(content), config=b"{}")
    for whole, same in ((False, True), (True, False)):
        one, other = (list(fingerprints([path], whole).files.values()) for path in (before, after))
        assert (one == other, one[0] == other[0]) == (same, True)


def test_another_size_or_end_is_always_found(tmp_path: Path) -> None:
    digests = {
        fingerprints([folder_of(tmp_path / str(number), weights=content)], False).files[f"{tmp_path}/{number}/weights"]
        for number, content in enumerate((b"x" * 9000, b"x" * 9001, b"x" * 8999 + b"y"))
    }
    assert len(digests) == 3


def test_folders_that_are_missing_and_files_that_are_hidden(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", weights=b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "note").write_text("x")
    found = fingerprints([folder, tmp_path / "none"], False)
    assert (list(found.files), found.missing) == ([str(folder / "weights")], [str(tmp_path / "none")])


def test_what_the_hub_has_published(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", good=b"x", bad=b"y", small=b"z")
    notes = folder / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    digest = hashlib.sha256(b"x").hexdigest()
    for name, tag in (("good", digest), ("bad", digest), ("small", "0" * 40)):
        (notes / f"{name}.metadata").write_text(f"{'1' * 40}\n{tag}\n1700000000.0\n")
    assert fingerprints([folder], True).wrong == [str(folder / "bad")]
    assert fingerprints([folder], False).wrong == []
