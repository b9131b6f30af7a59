"""Objects as files below a folder, which hosts may share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import obstore
from obstore.store import LocalStore

from serve_app.config.paths import folder_of, home_of
from serve_app.errors import ConfigError
from serve_app.storage.backend import CHUNK_BYTES, Backend, Method, StorageRefused

_MIB = 1 << 20


class Folder(Backend):
    """A `Backend` on the local file system.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, url: str, min_free_mib: float) -> None:
        self.folder = home_of("storage.url", folder_of(url)).absolute()
        self._min_free_mib = min_free_mib
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"storage.url has value {url!r}: the folder cannot be made: {error.strerror}") from None
        self._store = LocalStore(self.folder)

    def put(self, key: str, data: bytes | Path, filename: str | None, mark: str) -> None:
        # Names and types are not kept: whoever serves a file derives them from its key. No mark: a file system answers.
        obstore.put(self._store, key, data, mode="create")

    def get(self, key: str) -> bytes:
        return bytes(obstore.get(self._store, key).bytes())

    def chunks(self, key: str, start: int, end: int) -> Iterator[bytes]:
        result = obstore.get(self._store, key, options={"range": (start, end)})
        for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)

    def delete_prefix(self, prefix: str) -> int:
        count = 0
        # Missing when another process sweeps the same prefix; the folder goes in any case.
        with suppress(FileNotFoundError):
            count = super().delete_prefix(prefix)
        # What a killed writer left behind (`name#1`) is invisible to list.
        shutil.rmtree(self.folder / prefix, ignore_errors=True)
        return count

    def ping(self) -> None:
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise StorageRefused(f"storage: {self.folder} cannot be written to")
        free_mib = shutil.disk_usage(self.folder).free / _MIB
        if free_mib < self._min_free_mib:
            raise OSError(
                f"storage: {self.folder} has {free_mib:.0f} MiB free, expected {self._min_free_mib:g} "
                "(storage.min_free_mib)"
            )

    def link(self, key: str, method: Method) -> str | None:
        return None

    def explain(self, error: Exception) -> OSError:
        return OSError(f"storage: {str(error).strip().splitlines()[0]}")
