from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.storage import CHUNK_BYTES, Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "new" / "videos"))


async def read(storage: Storage, key: str, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in storage.stream(key, start, end)])


async def test_put_stat_stream(storage: Storage, tmp_path: Path) -> None:
    data = bytes(range(256)) * 12_000
    await storage.put("videos/a/1/video.mp4", data)
    stat = await storage.stat("videos/a/1/video.mp4")
    assert stat.size == len(data)
    assert stat.etag.startswith('"') and stat.etag.endswith('"')
    assert stat.modified.tzinfo is not None
    assert await read(storage, "videos/a/1/video.mp4") == data
    assert await read(storage, "videos/a/1/video.mp4", 5, 2_000_000) == data[5:2_000_000]
    assert await read(storage, "videos/a/1/video.mp4", 7, 7) == b""
    sizes = [len(chunk) async for chunk in storage.stream("videos/a/1/video.mp4")]
    assert max(sizes) <= 2 * CHUNK_BYTES and len(sizes) >= 2
    file = tmp_path / "file.bin"
    file.write_bytes(data)
    await storage.put("videos/b", file)
    assert await read(storage, "videos/b") == data


async def test_get(storage: Storage) -> None:
    data = bytes(range(256)) * 12_000
    await storage.put("samples/a/7", data)
    got = await storage.get("samples/a/7")
    assert type(got) is bytes and got == data
    with pytest.raises(FileNotFoundError, match="storage holds no 'samples/a/8'"):
        await storage.get("samples/a/8")
    with pytest.raises(FileNotFoundError, match="storage holds no 'samples/a'"):
        await storage.get("samples/a")


async def test_list(storage: Storage) -> None:
    assert await storage.list("samples/a") == []
    for key in ("samples/a/10", "samples/a/9", "samples/a/x/1", "samples/ab/1", "samples/b"):
        await storage.put(key, b"x")
    (storage.folder / "samples/a/11#1").write_bytes(b"of a killed writer")
    assert await storage.list("samples/a") == ["samples/a/10", "samples/a/9", "samples/a/x/1"]
    assert len(await storage.list("samples")) == 5


async def test_delete(storage: Storage) -> None:
    await storage.put("samples/a/1", b"x")
    await storage.put("samples/a/2", b"x")
    await storage.delete("samples/a/1")
    assert await storage.list("samples/a") == ["samples/a/2"]
    await storage.delete("samples/a/1")
    await storage.delete("samples/none/1")
    await storage.put("samples/a/1", b"again")
    assert await storage.get("samples/a/1") == b"again"


async def test_empty_object(storage: Storage) -> None:
    await storage.put("empty", b"")
    assert await storage.get("empty") == b""
    assert (await storage.stat("empty")).size == 0
    assert await read(storage, "empty") == b""


async def test_put_creates_only(storage: Storage) -> None:
    await storage.put("videos/a", b"first")
    with pytest.raises(FileExistsError, match="videos/a"):
        await storage.put("videos/a", b"second")
    assert await read(storage, "videos/a") == b"first"


async def test_put_shows_no_half_file(storage: Storage) -> None:
    data = b"x" * 30_000_000
    writing = asyncio.create_task(storage.put("big", data))
    while not writing.done():
        try:
            assert (await storage.stat("big")).size == len(data)
        except FileNotFoundError:
            await asyncio.sleep(0)
    await writing


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
    assert await storage.delete_prefix("samples/a") == 1
    assert not any(storage.folder.rglob("*#*"))


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


async def test_missing(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError, match="storage holds no 'videos/none'"):
        await storage.stat("videos/none")
    with pytest.raises(FileNotFoundError, match="storage holds no 'videos/none'"):
        await read(storage, "videos/none")
    with pytest.raises(FileNotFoundError):
        await read(storage, "videos/none", 0, 10)


async def test_delete_prefix(storage: Storage) -> None:
    for key in ("videos/a/1/video.mp4", "videos/a/2/video.mp4", "videos/ab/1/video.mp4"):
        await storage.put(key, b"x")
    (storage.folder / "videos/a/1/left.mp4#1").write_bytes(b"of a killed writer")
    assert await storage.delete_prefix("videos/a") == 2
    assert not (storage.folder / "videos/a").exists()
    assert await read(storage, "videos/ab/1/video.mp4") == b"x"
    assert await storage.delete_prefix("videos/a") == 0


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a/..",
        "a//b",
        "a/",
        "a\\b",
        ".hidden",
        "a/.b",
        "a#1",
        "a b",
        "a\n",
        "ä",
        "a\0",
    ],
)
async def test_malformed_keys(storage: Storage, key: str) -> None:
    with pytest.raises(ValueError, match="storage key"):
        await storage.put(key, b"x")
    with pytest.raises(ValueError, match="storage key"):
        await storage.stat(key)
    with pytest.raises(ValueError, match="storage key"):
        await read(storage, key, 0, 1)
    for call in (storage.get, storage.list, storage.delete, storage.delete_prefix):
        with pytest.raises(ValueError, match="storage key"):
            await call(key)


def test_urls(tmp_path: Path) -> None:
    assert Storage(f"file://{tmp_path}/v").folder == tmp_path / "v"
    with pytest.raises(ConfigError, match=r"storage.url has value 's3://bucket', expected a folder"):
        Storage("s3://bucket")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        Storage(str(tmp_path / "file" / "v"))
