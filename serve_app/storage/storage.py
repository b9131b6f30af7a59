"""The one interface to stored objects, for event loops."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from obstore.exceptions import AlreadyExistsError, BaseError

from serve_app import config
from serve_app.errors import ConfigError, one_line
from serve_app.logs import get_logger
from serve_app.storage.backend import CHUNK_BYTES, Backend, Method, Stat, StorageRefused
from serve_app.storage.bucket import Bucket
from serve_app.storage.folder import Folder

__all__ = ["CHUNK_BYTES", "Storage", "trouble_with"]

T = TypeVar("T")
_Keys = list[str]  # inside `Storage`, `list` is a method

logger = get_logger(__name__)

# Every segment starts with a letter, digit or underscore: no `..`, no hidden files, no empty segments, no staging
# files of the local store (`name#1`), no separators of other systems.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
# Of this storage's own, because calls to a server that hangs would use up the event loop's, and with them all that
# else runs in threads.
_THREADS = 16


class Storage:
    """Objects on a local folder, which is created if missing, or in a bucket of S3.

    Every call runs obstore's blocking form in a thread. Its asynchronous form was measured to abort 5 of 20
    interpreters that exit right after a call (obstore 0.12, Python 3.11): its runtime wakes the event loop after the
    interpreter has begun to go.

    Where nothing more precise is said, what the file system refuses (a full disk, missing rights), or a server that
    refuses or does not answer within `timeout_s` and `retry_s`, is an OSError.

    Args:
        options: with its `url` filled in (see `Config.storage_options`), or a folder alone.

    Raises:
        ConfigError: the folder cannot be made, or the URL names a kind of store that is not offered.
    """

    def __init__(self, options: config.StorageConfig | str) -> None:
        if isinstance(options, str):
            options = config.validate({"storage": {"url": options}}, "storage").storage
        self._options = options
        self._backend: Backend = Bucket(options) if options.bucket else Folder(options.url, options.min_free_mib)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="storage")

    @property
    def folder(self) -> Path:
        """Where the files lie.

        Raises:
            TypeError: they are objects of S3.
        """
        if isinstance(self._backend, Folder):
            return self._backend.folder
        raise TypeError(f"{self._options.url} is no folder")

    async def check(self) -> None:
        """Find out early what is wrong.

        Raises:
            ConfigError: the storage says no. One that does not answer, or is full, is only logged: it may come back,
                and `ping` tells until it does.
        """
        if (trouble := await self.trouble()) is not None:
            logger.warning("storage not usable yet", extra={"error": one_line(trouble)})

    async def trouble(self) -> OSError | None:
        """Why nothing can be stored now, though the storage does not say no; None if it can.

        Raises:
            ConfigError: it says no.
        """
        key = f"_check/{secrets.token_hex(8)}"
        try:
            await self.ping()
            if self._options.bucket:  # rights to list are not rights to write
                await self.put(key, b"")
                await self.delete(key)
        except StorageRefused as error:
            raise trouble_with(self._options, error) from None
        except OSError as error:
            return error
        return None

    async def ping(self) -> None:
        """Look whether the storage would take a write, without one.

        Raises:
            OSError: it would not, and why: it does not answer, or is full (`min_free_mib`).
        """
        await self._call(self._backend.ping)

    async def put(self, key: str, data: bytes | Path, filename: str | None = None) -> None:
        """Store bytes, or a file's content, under a new key. Readers see all of it or nothing.

        Args:
            filename: what it is called for somebody who gets it by a `link`.

        Raises:
            FileExistsError: the key is taken; what it holds stays as it is.
            OSError: it cannot be stored. Nothing of it can be seen.
            ValueError: the key is malformed.
        """
        _check(key)
        try:
            await self._call(self._backend.put, key, data, filename, secrets.token_hex(8))
        except AlreadyExistsError:
            raise FileExistsError(f"storage already holds {key!r}") from None

    async def stat(self, key: str) -> Stat:
        """Size, ETag and time of an object.

        Raises:
            FileNotFoundError: nothing is stored under the key.
        """
        _check(key)
        return await self._call(self._backend.stat, key, missing=key)

    async def get(self, key: str) -> bytes:
        """All bytes of an object.

        Raises:
            FileNotFoundError: nothing is stored under the key.
        """
        _check(key)
        return await self._call(self._backend.get, key, missing=key)

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
        chunks = self._backend.chunks(key, start, end)
        while (chunk := await self._call(next, chunks, None, missing=key)) is not None:
            yield chunk

    async def link(self, key: str, method: Method = "GET") -> str | None:
        """A URL that answers `method` for `presign_s` seconds to whoever knows it; None where there are none: on a
        folder, and with `proxy`. Says nothing on whether the object is there.
        """
        _check(key)
        return await self._call(self._backend.link, key, method)

    async def list(self, prefix: str) -> _Keys:
        """The keys in the folder `prefix` and below, sorted; none if there is no such folder."""
        _check(prefix)
        return await self._call(self._backend.list, prefix)

    async def delete(self, key: str) -> None:
        """Remove an object. Removing what is not there is no error."""
        _check(key)
        with suppress(FileNotFoundError):
            await self._call(self._backend.delete, key)

    async def delete_prefix(self, prefix: str) -> int:
        """Remove every object in the folder `prefix`; how many there were. Removing nothing is no error."""
        _check(prefix)
        return await self._call(self._backend.delete_prefix, prefix)

    async def _call(self, function: Callable[..., T], *args: Any, missing: str | None = None) -> T:
        """What `function` returns, from a thread. obstore's own exceptions, which callers should not have to know,
        become OSErrors.
        """
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
            raise self._backend.explain(error) from error


def trouble_with(options: config.StorageConfig, error: OSError) -> ConfigError:
    """What a storage said, as an error of the option that names it."""
    told = str(error).removeprefix("storage: ").removeprefix(options.url).strip(" :")
    return ConfigError(f"storage.url has value {options.url!r}: {told}")


def _check(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"storage key is {key!r}, expected names of letters, digits, '.', '_', '-' joined by '/'")
