"""The interface of a kind of storage. All methods block, and callers have checked the keys."""

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
    """A refusal that will not pass by itself: a wrong bucket, wrong access keys, missing rights."""


@dataclass(frozen=True)
class Stat:
    """Facts about a stored object: size in bytes, a strong ETag with its quotes, time of writing (UTC)."""

    size: int
    etag: str
    modified: datetime

    @classmethod
    def of(cls, meta: Any) -> Stat:
        """Return the facts from obstore's metadata."""
        etag = meta["e_tag"] or f'"{meta["size"]:x}-{meta["last_modified"].timestamp():.6f}"'
        return cls(size=meta["size"], etag=etag, modified=meta["last_modified"])


class Backend(ABC):
    """A kind of storage. Failures are an OSError with one line, or obstore's own exceptions."""

    _store: Any
    """obstore's store of this kind."""

    @abstractmethod
    def put(self, key: str, data: bytes | Path, filename: str | None, mark: str) -> None:
        """Store an object under a new key, visible only once it is complete.

        Args:
            key: the new key.
            data: bytes, or a file with the content.
            filename: the name under which browsers save it; None for none.
            mark: a random text that identifies this call.

        Raises:
            FileExistsError: the key is taken by an object without the same mark.
        """

    def stat(self, key: str) -> Stat:
        """Return the facts about an object; FileNotFoundError if there is none."""
        return Stat.of(obstore.head(self._store, key))

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Return all of an object; FileNotFoundError if there is none."""

    @abstractmethod
    def chunks(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """Yield bytes `start` to `end` of an object in chunks of about 1 MiB; FileNotFoundError if there is none."""

    def list(self, prefix: str) -> list[str]:
        """Return the keys below a prefix, sorted."""
        return sorted(meta["path"] for batch in obstore.list(self._store, prefix=prefix) for meta in batch)

    def delete(self, key: str) -> None:
        """Delete an object. If there is none, that is no error or FileNotFoundError."""
        obstore.delete(self._store, key)

    def delete_prefix(self, prefix: str) -> int:
        """Delete all objects below a prefix; return how many there were."""
        keys = self.list(prefix)
        if keys:
            obstore.delete(self._store, keys)
        return len(keys)

    @abstractmethod
    def ping(self) -> None:
        """Raise an OSError if a write would fail, as far as can be told without writing."""

    @abstractmethod
    def link(self, key: str, method: Method) -> str | None:
        """Return a URL that answers `method` without further rights for a while; None if the kind has no such URLs."""

    @abstractmethod
    def explain(self, error: Exception) -> OSError:
        """Return an exception of obstore as an OSError with one line."""
