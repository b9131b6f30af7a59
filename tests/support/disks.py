"""A disk of some megabytes that tests can fill."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A small file system of its own.

    Args:
        folder: mount point of the file system.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Fill the disk but for so many bytes, to the page."""
        with self._ballast.open("wb") as file:
            try:
                while True:
                    os.write(file.fileno(), bytes(4096))
            except OSError:
                pass
            file.truncate(file.tell() // 4096 * 4096 - leave)

    def free(self) -> None:
        """Take the ballast away."""
        self._ballast.unlink()


@contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """Mount a disk of eight megabytes on a folder, as long as the block runs."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"no file system can be mounted, which takes root: {mount.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Disk]:
    """Yield a small disk: `tmp_path` itself, so that whatever a test has lies on it."""
    with mounted(tmp_path) as disk:
        yield disk
