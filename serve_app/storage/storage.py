"""The interface to stored objects, for event loops."""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from obstore.exceptions import AlreadyExistsError, BaseError

from serve_app import config
from serve_app.errors import ConfigError, one_line
from serve_app.logs import get_logger
from serve_app.metrics import catalog as metrics
from serve_app.storage.backend import CHUNK_BYTES, Backend, Method, Stat, StorageRefused
from serve_app.storage.bucket import Bucket
from serve_app.storage.folder import Folder

__all__ = ["CHUNK_BYTES", "Storage", "trouble_with"]

T = TypeVar("T")
_Keys = list[str]  # inside `Storage`, `list` is a method

logger = get_logger(__name__)

# Every segment starts with a letter, digit or underscore. That excludes `..`, hidden files, empty segments, staging
# files of the local store (`name#1`) and separators of other systems.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
# Kinds of calls that the metric of errors tells apart; all others read.
_CALLS = {"put": "write", "delete": "delete", "delete_prefix": "delete", "ping": "check"}
# Threads of this storage alone: calls to a server that hangs would use up the event loop's threads.
_THREADS = 16


class Storage:
    """Objects on a local folder, which is created if missing, or in a bucket of S3.

    Every call runs obstore's blocking form in a thread. Its asynchronous form was measured to abort 5 of 20
    interpreters that exit right after a call (obstore 0.12, Python 3.11): its runtime wakes the event loop after the
    interpreter has begun to shut down.

    Unless a method says otherwise, it raises OSError if the file system refuses (a full disk, missing rights), or if a
    server refuses or does not answer within `timeout_s` and `retry_s`.

    Args:
        options: options with `url` filled in (see `Config.storage_options`), or just a folder.

    Raises:
        ConfigError: the folder cannot be made, or the URL names an unknown kind of storage.
    """

    def __init__(self, options: config.StorageConfig | str) -> None:
        if isinstance(options, str):
            options = config.validate({"storage": {"url": options}}, "storage").storage
        self._options = options
        self._backend: Backend = Bucket(options) if options.bucket else Folder(options.url, options.min_free_mib)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="storage")

    @property
    def folder(self) -> Path:
        """The folder of the files.

        Raises:
            TypeError: they are objects of S3.
        """
        if isinstance(self._backend, Folder):
            return self._backend.folder
        raise TypeError(f"{self._options.url} is no folder")

    async def check(self) -> None:
        """Check that the storage is usable. One that is full or does not answer is only logged, since it may come back.

        Raises:
            ConfigError: the storage refuses, which will not pass by itself.
        """
        if (trouble := await self.trouble()) is not None:
            logger.warning("storage not usable yet", extra={"error": one_line(trouble)})

    async def trouble(self) -> OSError | None:
        """Return why nothing can be stored now, if that may pass by itself; None if the storage is usable.

        Raises:
            ConfigError: the storage refuses, which will not pass by itself.
        """
        key = f"_check/{secrets.token_hex(8)}"
        try:
            await self.ping()
            if self._options.bucket:  # the right to list does not include the right to write
                await self.put(key, b"")
                await self.delete(key)
        except StorageRefused as error:
            raise trouble_with(self._options, error) from None
        except OSError as error:
            return error
        return None

    async def ping(self) -> None:
        """Check without writing that the storage would take a write.

        Raises:
            OSError: it would not: it does not answer, or is full (`min_free_mib`). The message says which.
        """
        await self._call(self._backend.ping)

    async def put(self, key: str, data: bytes | Path, filename: str | None = None) -> None:
        """Store bytes, or a file's content, under a new key. Readers see all of it or nothing.

        Args:
            key: the new key.
            data: bytes, or a file with the content.
            filename: the name under which somebody saves it who gets it by a `link`.

        Raises:
            FileExistsError: the key is taken; its object stays as it is.
            OSError: it cannot be stored. Readers see nothing of it.
            ValueError: the key is malformed.
        """
        _check(key)
        try:
            await self._call(self._backend.put, key, data, filename, secrets.token_hex(8))
        except AlreadyExistsError:
            raise FileExistsError(f"storage already holds {key!r}") from None

    async def stat(self, key: str) -> Stat:
        """Return size, ETag and time of an object.

        Raises:
            FileNotFoundError: nothing is stored under the key.
        """
        _check(key)
        return await self._call(self._backend.stat, key, missing=key)

    async def get(self, key: str) -> bytes:
        """Return all bytes of an object.

        Raises:
            FileNotFoundError: nothing is stored under the key.
        """
        _check(key)
        return await self._call(self._backend.get, key, missing=key)

    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Yield the bytes from `start` up to, not including, `end` (None: the last) in chunks of about 1 MiB.

        Raises:
            FileNotFoundError: nothing is stored under the key.
        """
        if end is None:
            end = (await self.stat(key)).size
        _check(key)
        if start >= end:
            return
        chunks = self._backend.chunks(key, start, end)
        while (chunk := await self._call(next, chunks, None, missing=key)) is not None:
            yield chunk

    async def link(self, key: str, method: Method = "GET") -> str | None:
        """Return a URL that answers `method` for `presign_s` seconds to anybody; None for a folder, and with `proxy`.

        It does not check that the object is there.
        """
        _check(key)
        return await self._call(self._backend.link, key, method)

    async def list(self, prefix: str) -> _Keys:
        """Return the keys in the folder `prefix` and below, sorted; none if there is no such folder."""
        _check(prefix)
        return await self._call(self._backend.list, prefix)

    async def delete(self, key: str) -> None:
        """Delete an object. If there is none, that is no error."""
        _check(key)
        with suppress(FileNotFoundError):
            await self._call(self._backend.delete, key)

    async def delete_prefix(self, prefix: str) -> int:
        """Delete every object in the folder `prefix`; return how many there were. None is no error."""
        _check(prefix)
        return await self._call(self._backend.delete_prefix, prefix)

    async def _call(self, function: Callable[..., T], *args: Any, missing: str | None = None) -> T:
        """Return the result of `function`, called in a thread. obstore's own exceptions become OSErrors."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, function, *args)
        except AlreadyExistsError:
            raise
        except FileNotFoundError as error:
            if missing is None:
                raise
            raise FileNotFoundError(f"storage holds no {missing!r}") from error
        except BaseError as error:
            _count(function)
            raise self._backend.explain(error) from error
        except OSError:
            _count(function)
            raise

    def free_bytes(self) -> int | None:
        """Return the free space of the folder's disk, which may block for a moment; None for a bucket."""
        return shutil.disk_usage(self._backend.folder).free if isinstance(self._backend, Folder) else None


def _count(function: Callable[..., Any]) -> None:
    """Count a call of the backend that it refused or did not answer."""
    metrics.storage_errors.inc(call=_CALLS.get(function.__name__, "read"))


def trouble_with(options: config.StorageConfig, error: OSError) -> ConfigError:
    """Return an error of a storage as an error of the option that names it."""
    told = str(error).removeprefix("storage: ").removeprefix(options.url).strip(" :")
    return ConfigError(f"storage.url has value {options.url!r}: {told}")


def _check(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"storage key is {key!r}, expected names of letters, digits, '.', '_', '-' joined by '/'")
