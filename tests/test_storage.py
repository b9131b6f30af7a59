from __future__ import annotations

import asyncio
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


async def test_empty_object(storage: Storage) -> None:
    await storage.put("empty", b"")
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
    with pytest.raises(ValueError, match="storage key"):
        await storage.delete_prefix(key)


def test_urls(tmp_path: Path) -> None:
    assert Storage(f"file://{tmp_path}/v").folder == tmp_path / "v"
    with pytest.raises(ConfigError, match=r"storage.url has value 's3://bucket', expected a folder"):
        Storage("s3://bucket")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        Storage(str(tmp_path / "file" / "v"))
