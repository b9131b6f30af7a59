"""Behaviour and failures that only a folder has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app import config
from serve_app.errors import ConfigError
from serve_app.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "new" / "videos"))


PUT = """
import asyncio, sys
from serve_app.storage import Storage
asyncio.run(Storage(sys.argv[1]).put("samples/a/1", b"x" * 500_000_000))
"""


@pytest.fixture
def killed_writer(storage: Storage) -> None:
    """A process that was killed amid a `put` of samples/a/1."""
    writer = subprocess.Popen([sys.executable, "-c", PUT, str(storage.folder)])
    try:
        while not any(storage.folder.rglob("*#*")):
            assert writer.poll() is None, "it ended before it could be killed"
    finally:
        writer.kill()
        assert writer.wait() == -signal.SIGKILL
    assert [path.name for path in storage.folder.rglob("*") if path.is_file()] == ["1#1"]  # killed while it wrote


@pytest.mark.usefixtures("killed_writer")
async def test_a_writer_that_is_killed_leaves_nothing_to_see(storage: Storage) -> None:
    assert await storage.list("samples/a") == []
    with pytest.raises(FileNotFoundError):
        await storage.get("samples/a/1")
    await storage.put("samples/a/1", b"second")
    assert await storage.get("samples/a/1") == b"second"
    (storage.folder / "samples/a/left.mp4#1").write_bytes(b"of another one")
    assert await storage.list("samples/a") == ["samples/a/1"]
    assert await storage.delete_prefix("samples/a") == 1
    assert not (storage.folder / "samples/a").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_full_disk(small_disk: Path) -> None:
    storage = Storage(str(small_disk / "videos"))
    await storage.put("samples/a/1", b"x" * 300_000)
    for _ in range(3):  # what failed leaves no room missing either
        with pytest.raises(OSError, match=r"^storage: .*No space left on device[^\n]*$"):
            await storage.put("samples/a/2", b"x" * 4_000_000)
        with pytest.raises(FileNotFoundError):
            await storage.get("samples/a/2")
    assert await storage.list("samples") == ["samples/a/1"]
    assert [path.name for path in storage.folder.rglob("*") if path.is_file()] == ["1"]
    await storage.put("samples/a/3", b"x" * 300_000)


async def test_errors_of_the_file_system(storage: Storage) -> None:
    await storage.put("file", b"x")
    with pytest.raises(OSError, match=r"^storage: .*Not a directory[^\n]*$"):
        await storage.put("file/below", b"x")


async def test_a_disk_with_little_room(small_disk: Path) -> None:
    storage = Storage(config.StorageConfig(url=str(small_disk / "videos"), min_free_mib=0.5))
    await storage.ping()
    await storage.put("samples/a", b"x" * 700_000)
    with pytest.raises(OSError, match=r"^storage: .* has 0 MiB free, expected 0.5 \(storage.min_free_mib\)$"):
        await storage.ping()
    await storage.check()  # room may come back


@pytest.fixture
def read_only(small_disk: Path) -> Storage:
    storage = Storage(str(small_disk / "videos"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return storage


async def test_a_disk_that_cannot_be_written_to(read_only: Storage) -> None:
    with pytest.raises(ConfigError, match=r"^storage.url has value '.*videos': cannot be written to$"):
        await read_only.check()


async def test_there_are_no_links(storage: Storage) -> None:
    assert await storage.link("videos/a") is None


def test_urls(tmp_path: Path) -> None:
    assert Storage(f"file://{tmp_path}/v").folder == tmp_path / "v"
    with pytest.raises(ConfigError, match=r"url has value 'ftp://host', expected a folder or s3://bucket/prefix$"):
        Storage("ftp://host")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        Storage(str(tmp_path / "file" / "v"))
