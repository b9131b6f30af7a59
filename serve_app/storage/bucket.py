"""Objects in an S3 bucket: AWS, MinIO, Ceph, Swift, and others that speak its protocol.

Every request moves at most 8 MiB, whatever the size of the object, so that one time limit fits all and a server that
hangs is noticed. Each is repeated for a while, so that a server that restarts is waited for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from serve_app import config
from serve_app.storage.backend import CHUNK_BYTES, Backend, Method, StorageRefused
from serve_app.storage.names import content_type, disposition

PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 4
_PING_S = 5
_BACKOFF: Any = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2}
# The metadata field that says which call wrote an object.
_WRITER = "put-id"

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
# Answers below 500 that may pass by themselves.
_TRANSIENT = {"408", "409", "412", "429", "RequestTimeout", "NoSuchUpload"}
_KIND = re.compile(r"\bkind: (Connect|Timeout)\b")


class Bucket(Backend):
    """A `Backend` on S3.

    A put of up to 8 MiB is one conditional request. A larger one is a multipart upload, which nobody can see before it
    is complete. Servers agree on no conditional form of it, so `put` looks first and does not replace an object. That
    guards against mistakes but is no lock, and need not be: keys hold the number of the attempt or random bits, so no
    two writers share one.
    """

    def __init__(self, options: config.StorageConfig) -> None:
        self._options = options
        self._store = self._open(options)
        quick = {"timeout_s": min(options.timeout_s, _PING_S), "retry_s": 0}
        self._quick = self._open(options.model_copy(update=quick))
        public = options.public_endpoint or options.endpoint
        self._public = self._open(options.model_copy(update={"endpoint": public}))

    def _open(self, options: config.StorageConfig) -> S3Store:
        endpoint = options.endpoint
        values: dict[str, Any] = {"endpoint": endpoint.rstrip("/"), "region": options.region}
        client: dict[str, Any] = {
            "timeout": timedelta(seconds=options.timeout_s),
            "connect_timeout": timedelta(seconds=min(options.timeout_s, 5)),
        }
        if endpoint.startswith("http://"):
            client["allow_http"] = True
        return S3Store(
            options.bucket,
            prefix=options.prefix or None,
            client_options=client,  # type: ignore[arg-type]
            retry_config={
                "max_retries": 1000 if options.retry_s else 0,  # the time is the limit
                "retry_timeout": timedelta(seconds=options.retry_s),
                "backoff": _BACKOFF,
            },
            **{name: value for name, value in values.items() if value},
        )

    def put(self, key: str, data: bytes | Path, filename: str | None, mark: str) -> None:
        """Store an object, as `Backend.put` says."""
        attributes = {"Content-Type": content_type(key), _WRITER: mark}
        if filename is not None:
            attributes["Content-Disposition"] = disposition(filename)
        give_up = time.monotonic() + self._options.retry_s
        pause_s = 0.1
        # obstore repeats what it knows to be safe. A request that was never answered is decided here: the object may
        # have been stored, and then it bears this call's mark.
        while True:
            if (writer := self._writer(key)) is not None:
                if writer == mark:
                    return
                raise FileExistsError(f"storage already holds {key!r}")
            try:
                self._upload(key, data, attributes)
                return
            except (BaseError, FileNotFoundError) as error:  # FileNotFoundError: no bucket, or an aborted upload
                told = self.explain(error)
                if isinstance(told, StorageRefused) or time.monotonic() >= give_up:
                    raise told from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 3)

    def _writer(self, key: str) -> str | None:
        """Return the mark of the call that wrote an object, empty if it has none; None if there is no object."""
        try:
            return str(obstore.get(self._store, key, options={"head": True}).attributes.get(_WRITER, ""))
        except FileNotFoundError:
            return None

    def _upload(self, key: str, data: bytes | Path, attributes: Any) -> None:
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        if size > PART_BYTES:
            obstore.put(
                self._store,
                key,
                data,
                attributes=attributes,
                use_multipart=True,
                chunk_size=PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )
        else:
            mode: Any = "create" if self._options.conditional_put else "overwrite"
            obstore.put(self._store, key, data, attributes=attributes, use_multipart=False, mode=mode)

    def get(self, key: str) -> bytes:
        """Return all of an object."""
        return b"".join(self.chunks(key, 0, self.stat(key).size))

    def chunks(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """Yield a part of an object."""
        for first in range(start, end, PART_BYTES):
            part = memoryview(obstore.get_range(self._store, key, start=first, end=min(first + PART_BYTES, end)))
            for offset in range(0, len(part), CHUNK_BYTES):
                yield bytes(part[offset : offset + CHUNK_BYTES])

    def ping(self) -> None:
        """Raise an OSError if the bucket cannot be listed within a few seconds."""
        # Nothing is ever stored in this folder, so listing it is as cheap as it gets.
        try:
            for _ in obstore.list(self._quick, prefix="_none"):
                break
        except BaseError as error:
            raise self._explain(error, min(self._options.timeout_s, _PING_S)) from error

    def link(self, key: str, method: Method) -> str | None:
        """Return a presigned URL; None with `storage.proxy`."""
        if self._options.proxy:
            return None
        return obstore.sign(self._public, method, key, timedelta(seconds=self._options.presign_s))

    def explain(self, error: Exception) -> OSError:
        """Return an exception of obstore as an OSError with one line."""
        return self._explain(error, self._options.timeout_s)

    def _explain(self, error: Exception, within_s: float) -> OSError:
        text = str(error)
        options = self._options
        where = f"storage: {options.url}" + (f" at {options.endpoint}" if options.endpoint else "")
        if "/latest/api/token" in text or "/latest/meta-data" in text:
            return StorageRefused(
                f"{where}: no access keys: AWS_ACCESS_KEY_ID is not set, and this is no instance of AWS"
            )
        if status := _STATUS.search(text):
            code, message = (found[1] if (found := part.search(text)) else "" for part in (_CODE, _MESSAGE))
            told = " ".join(f"{status[1]} {code} {message}".split())
            transient = status[1] >= "500" or status[1] in _TRANSIENT or code in _TRANSIENT
            return (OSError if transient else StorageRefused)(f"{where}: {told}{_hint(status[1], code)}")
        kinds = {found[1] for found in _KIND.finditer(text)}
        if "Timeout" in kinds:
            return OSError(f"{where}: no answer within {within_s:g} s (storage.endpoint, storage.timeout_s)")
        if "Connect" in kinds:
            return OSError(f"{where}: cannot connect (storage.endpoint)")
        return OSError(f"{where}: {text.strip().splitlines()[0]}")


def _hint(status: str, code: str) -> str:
    """Return the option that an answer of S3 is about, in brackets."""
    if code == "NoSuchBucket":
        return " (storage.url)"
    if code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
        return " (storage.region)"
    if code == "NotImplemented":
        return " (storage.conditional_put)"
    if status in ("401", "403") and code in ("", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return " (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
    return ""
