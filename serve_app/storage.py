"""Where videos are kept: objects under keys such as `videos/<id>/<attempt>/video.mp4`, on a local folder.

Knows nothing of jobs or HTTP. obstore speaks to object stores too, so another `url` is all that S3 will need here.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from serve_app.errors import ConfigError

T = TypeVar("T")
_Keys = list[str]  # inside `Storage`, `list` is a method

CHUNK_BYTES = 1 << 20
# Every segment starts with a letter, digit or underscore: no `..`, no hidden files, no empty segments, no staging
# files of the local store (`name#1`), no separators of other systems.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class Stat:
    """What is known of a stored object: size in bytes, a strong ETag with its quotes, time of writing (UTC)."""

    size: int
    etag: str
    modified: datetime


class Storage:
    """Objects on a local folder, which is created if missing.

    Every call runs obstore's blocking form in a thread. Its asynchronous form was measured to abort 5 of 20
    interpreters that exit right after a call (obstore 0.12, Python 3.11): its runtime wakes the event loop after the
    interpreter has begun to go.

    Where nothing more precise is said, what the file system refuses (a full disk, missing rights) is an OSError.

    Args:
        min_free_mib: free space below which the storage counts as full.

    Raises:
        ConfigError: the folder cannot be made, or the URL names a kind of store that is not offered.
    """

    def __init__(self, url: str, min_free_mib: float = 0) -> None:
        path = url.removeprefix("file://")
        if "://" in path:
            raise ConfigError(f"storage.url has value {url!r}, expected a folder")
        self.folder = Path(path).expanduser().absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"storage.url has value {url!r}: the folder cannot be made: {error.strerror}") from None
        self._store = LocalStore(self.folder)
        self._min_free_mib = min_free_mib

    async def ping(self) -> None:
        """Look whether the storage would take a write, without one.

        Raises:
            OSError: it would not, and why.
        """
        await asyncio.to_thread(self._ping)

    def _ping(self) -> None:
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise OSError(f"storage: {self.folder} cannot be written to")
        free_mib = shutil.disk_usage(self.folder).free / 2**20
        if free_mib < self._min_free_mib:
            raise OSError(f"storage: {self.folder} has {free_mib:.0f} MiB free, expected {self._min_free_mib:g}")

    async def put(self, key: str, data: bytes | Path) -> None:
        """Store bytes, or a file's content, under a new key. Readers see all of it or nothing.

        Raises:
            FileExistsError: the key is taken; what it holds stays as it is.
            OSError: it cannot be stored. Nothing of it is left.
            ValueError: the key is malformed.
        """
        _check(key)
        try:
            await asyncio.to_thread(_translated, obstore.put, self._store, key, data, mode="create")
        except AlreadyExistsError:
            raise FileExistsError(f"storage already holds {key!r}") from None

    async def stat(self, key: str) -> Stat:
        """Size, ETag and time of an object.

        Raises:
            FileNotFoundError: nothing is stored under the key.
        """
        _check(key)
        try:
            meta = await asyncio.to_thread(_translated, obstore.head, self._store, key)
        except FileNotFoundError:
            raise FileNotFoundError(f"storage holds no {key!r}") from None
        etag = meta["e_tag"] or f'"{meta["size"]:x}-{meta["last_modified"].timestamp():.6f}"'
        return Stat(size=meta["size"], etag=etag, modified=meta["last_modified"])

    async def get(self, key: str) -> bytes:
        """All bytes of an object.

        Raises:
            FileNotFoundError: nothing is stored under the key.
        """
        _check(key)
        try:
            return await asyncio.to_thread(_translated, self._get, key)
        except FileNotFoundError:
            raise FileNotFoundError(f"storage holds no {key!r}") from None

    def _get(self, key: str) -> bytes:
        return bytes(obstore.get(self._store, key).bytes())

    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from `start` up to, not including, `end` (None: to the last), in chunks of about 1 MiB.

        Raises:
            FileNotFoundError: nothing is stored under the key.
        """
        if end is None:
            end = (await self.stat(key)).size
        _check(key)
        if start >= end:
            return
        try:
            result = await asyncio.to_thread(
                _translated, obstore.get, self._store, key, options={"range": (start, end)}
            )
        except FileNotFoundError:
            raise FileNotFoundError(f"storage holds no {key!r}") from None
        chunks = iter(result.stream(min_chunk_size=CHUNK_BYTES))
        while (chunk := await asyncio.to_thread(_translated, next, chunks, None)) is not None:
            yield bytes(chunk)

    async def list(self, prefix: str) -> _Keys:
        """The keys in the folder `prefix` and below, sorted; none if there is no such folder."""
        _check(prefix)
        return await asyncio.to_thread(_translated, self._list, prefix)

    def _list(self, prefix: str) -> _Keys:
        return sorted(meta["path"] for batch in obstore.list(self._store, prefix=prefix) for meta in batch)

    async def delete(self, key: str) -> None:
        """Remove an object. Removing what is not there is no error."""
        _check(key)
        with suppress(FileNotFoundError):
            await asyncio.to_thread(_translated, obstore.delete, self._store, key)

    async def delete_prefix(self, prefix: str) -> int:
        """Remove every object in the folder `prefix`; how many there were. Removing nothing is no error."""
        _check(prefix)
        return await asyncio.to_thread(_translated, self._delete_prefix, prefix)

    def _delete_prefix(self, prefix: str) -> int:
        keys = self._list(prefix)
        if keys:
            # Missing when another process sweeps the same prefix; the folder below goes in any case.
            with suppress(FileNotFoundError):
                obstore.delete(self._store, keys)
        # What a killed writer left behind (`name#1`) is invisible to list.
        shutil.rmtree(self.folder / prefix, ignore_errors=True)
        return len(keys)


def _translated(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """What `function` returns. obstore's own exceptions, which callers should not have to know, become OSErrors."""
    try:
        return function(*args, **options)
    except AlreadyExistsError:
        raise
    except BaseError as error:
        raise OSError(f"storage: {str(error).strip().splitlines()[0]}") from error


def _check(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"storage key is {key!r}, expected names of letters, digits, '.', '_', '-' joined by '/'")
