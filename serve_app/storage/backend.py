"""What a kind of storage has to do. All of it blocks, and keys have been checked before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import obstore

CHUNK_BYTES = 1 << 20
Method = Literal["GET", "HEAD"]


class StorageRefused(OSError):
    """The storage says no, and will say it again: a wrong bucket, wrong access keys, missing rights."""


@dataclass(frozen=True)
class Stat:
    """What is known of a stored object: size in bytes, a strong ETag with its quotes, time of writing (UTC)."""

    size: int
    etag: str
    modified: datetime

    @classmethod
    def of(cls, meta: Any) -> Stat:
        """From what obstore tells."""
        etag = meta["e_tag"] or f'"{meta["size"]:x}-{meta["last_modified"].timestamp():.6f}"'
        return cls(size=meta["size"], etag=etag, modified=meta["last_modified"])


class Backend(ABC):
    """A kind of storage. What goes wrong is an OSError with one line, or obstore's own exception."""

    _store: Any
    """obstore's, of the kind."""

    @abstractmethod
    def put(self, key: str, data: bytes | Path, filename: str | None, mark: str) -> None:
        """Store under a new key, visible only when whole; FileExistsError if it is taken, unless by what bears the same
        mark.
        """

    def stat(self, key: str) -> Stat:
        """FileNotFoundError if there is nothing."""
        return Stat.of(obstore.head(self._store, key))

    @abstractmethod
    def get(self, key: str) -> bytes:
        """All of an object; FileNotFoundError if there is nothing."""

    @abstractmethod
    def chunks(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """A part of an object, in pieces of about 1 MiB; FileNotFoundError if there is nothing."""

    def list(self, prefix: str) -> list[str]:
        """The keys below, sorted."""
        return sorted(meta["path"] for batch in obstore.list(self._store, prefix=prefix) for meta in batch)

    def delete(self, key: str) -> None:
        """Nothing to delete is no error, or FileNotFoundError."""
        obstore.delete(self._store, key)

    def delete_prefix(self, prefix: str) -> int:
        """Remove all below; how many objects there were."""
        keys = self.list(prefix)
        if keys:
            obstore.delete(self._store, keys)
        return len(keys)

    @abstractmethod
    def ping(self) -> None:
        """Raise an OSError when a write would fail, as far as can be told without one."""

    @abstractmethod
    def link(self, key: str, method: Method) -> str | None:
        """A URL that answers `method` without further rights for a while; None where there is no such thing."""

    @abstractmethod
    def explain(self, error: Exception) -> OSError:
        """An exception of obstore's in one line."""
