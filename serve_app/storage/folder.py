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
        """Store an object, as `Backend.put` says."""
        # Names and types are derived from the key when a file is served. No mark: a file system answers.
        obstore.put(self._store, key, data, mode="create")

    def get(self, key: str) -> bytes:
        """Return all of an object."""
        return bytes(obstore.get(self._store, key).bytes())

    def chunks(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """Yield a part of an object."""
        result = obstore.get(self._store, key, options={"range": (start, end)})
        for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)

    def delete_prefix(self, prefix: str) -> int:
        """Delete all objects below a prefix, and the folder itself."""
        count = 0
        # Files may be missing when another process deletes the same prefix; the folder goes in any case.
        with suppress(FileNotFoundError):
            count = super().delete_prefix(prefix)
        # `list` does not see files that a killed writer left behind (`name#1`).
        shutil.rmtree(self.folder / prefix, ignore_errors=True)
        return count

    def ping(self) -> None:
        """Raise an OSError if the folder cannot be written to or its disk is nearly full."""
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise StorageRefused(f"storage: {self.folder} cannot be written to")
        free_mib = shutil.disk_usage(self.folder).free / _MIB
        if free_mib < self._min_free_mib:
            raise OSError(
                f"storage: {self.folder} has {free_mib:.0f} MiB free, expected {self._min_free_mib:g} "
                "(storage.min_free_mib)"
            )

    def link(self, key: str, method: Method) -> str | None:
        """Return None: a folder has no URLs."""
        return None

    def explain(self, error: Exception) -> OSError:
        """Return an exception of obstore as an OSError with one line."""
        return OSError(f"storage: {str(error).strip().splitlines()[0]}")
