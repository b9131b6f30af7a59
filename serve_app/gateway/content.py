"""A stored file as an HTTP response: ranges, validators, and a file name."""

from __future__ import annotations

import re
from email.utils import format_datetime

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response, StreamingResponse

from serve_app.gateway.errors import ApiError
from serve_app.storage import Stat, Storage, content_type, disposition

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def redirect(url: str) -> Response:
    """302 to where the storage itself serves a file. Ranges and validators are its business then."""
    return RedirectResponse(url, 302, headers={"cache-control": "private, no-store"})


def respond(storage: Storage, key: str, stat: Stat, name: str, headers: Headers, *, head: bool = False) -> Response:
    """The file under `key`, or the part of it that the request's headers ask for.

    Args:
        name: file name for a browser to save under.
        head: send the headers only.

    Raises:
        ApiError: 416, the range lies beyond the end.
    """
    answer = {
        "accept-ranges": "bytes",
        "etag": stat.etag,
        "last-modified": format_datetime(stat.modified, usegmt=True),
        # The bytes never change, but the video may be deleted: ask again each time.
        "cache-control": "private, no-cache",
        "content-disposition": disposition(name),
        "content-type": content_type(key),
    }
    if _matches(headers.get("if-none-match"), stat.etag):
        return Response(status_code=304, headers=answer)
    start, end, status = 0, stat.size, 200
    asked = byte_range(headers.get("range"), stat.size)
    if asked is not None and headers.get("if-range", stat.etag) in (stat.etag, answer["last-modified"]):
        start, end = asked
        status = 206
        answer["content-range"] = f"bytes {start}-{end - 1}/{stat.size}"
    answer["content-length"] = str(end - start)
    if head:
        return Response(status_code=status, headers=answer)
    return StreamingResponse(storage.stream(key, start, end), status, headers=answer)


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Start and end (exclusive) of a single range; None where the whole file is the answer: no range, or one that
    is malformed or multiple, which a server may ignore.

    Raises:
        ApiError: 416, no byte of the file is in the range.
    """
    match = _RANGE.fullmatch(header.replace(" ", "")) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return None
    else:
        start, end = max(size - int(last), 0), size
    if start >= end:
        message = f"The range {header!r} lies outside the file's {size} bytes."
        raise ApiError(416, "range_not_satisfiable", message, content_range=f"bytes */{size}")
    return start, end


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    return header.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in header.split(",")]
