"""A stored file as an HTTP response: ranges, validators, and a file name."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response, StreamingResponse

from serve_app.gateway.http.errors import ApiError
from serve_app.storage import Stat, Storage, content_type, disposition

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)
_ETAG = re.compile(r'(?:W/)?"[^"]*"')


def redirect(url: str) -> Response:
    """Return a 302 to the storage's own URL of a file. The storage then handles ranges and conditions."""
    return RedirectResponse(url, 302, headers={"cache-control": "private, no-store"})


def respond(storage: Storage, key: str, stat: Stat, name: str, headers: Headers, *, head: bool = False) -> Response:
    """Return a stored file, or the part of it that the request's headers ask for.

    Args:
        storage: where the file is.
        key: its key there.
        stat: its size, time and tag.
        name: file name under which a browser saves it.
        headers: those of the request.
        head: send the headers only.

    Raises:
        ApiError: 416, the range lies outside of the file; 412, the client asks for another version of the file.
    """
    answer = {
        "accept-ranges": "bytes",
        "etag": stat.etag,
        "last-modified": format_datetime(stat.modified, usegmt=True),
        # The bytes never change, but the video may be deleted, so a cache has to ask each time.
        "cache-control": "private, no-cache",
        "content-disposition": disposition(name),
        "content-type": content_type(key),
    }
    modified = stat.modified.replace(microsecond=0)  # the resolution of `Last-Modified`
    _check_unchanged(headers, stat.etag, modified)
    if _is_known(headers, stat.etag, modified):
        return Response(status_code=304, headers=answer)
    start, end, status = 0, stat.size, 200
    # HEAD describes the whole file, whatever `Range` says.
    if not head and _is_same(headers.get("if-range"), stat.etag, modified):
        asked = byte_range(headers.get("range"), stat.size)
    else:
        asked = None
    if asked is not None:
        start, end = asked
        status = 206
        answer["content-range"] = f"bytes {start}-{end - 1}/{stat.size}"
    answer["content-length"] = str(end - start)
    if head:
        return Response(status_code=status, headers=answer)
    return StreamingResponse(storage.stream(key, start, end), status, headers=answer)


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return start and end (exclusive) of the range in bytes that a header asks for.

    It is None, for the whole file, if there is no range, or a malformed or multiple one, which a server may ignore.

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


def _check_unchanged(headers: Headers, etag: str, modified: datetime) -> None:
    """Check `If-Match`, or else `If-Unmodified-Since`.

    Raises:
        ApiError: 412.
    """
    tags = headers.getlist("if-match")
    before = _date(headers.get("if-unmodified-since"))
    changed = not _names(tags, etag, weak=False) if tags else before is not None and modified > before
    if changed:
        said = "If-Match" if tags else "If-Unmodified-Since"
        raise ApiError(412, "precondition_failed", f"The file is not the one that {said} asks for.", etag=etag)


def _is_known(headers: Headers, etag: str, modified: datetime) -> bool:
    """Return whether the client has this file, by `If-None-Match`, or else by `If-Modified-Since`."""
    if tags := headers.getlist("if-none-match"):
        return _names(tags, etag, weak=True)
    since = _date(headers.get("if-modified-since"))
    return since is not None and modified <= since


def _is_same(if_range: str | None, etag: str, modified: datetime) -> bool:
    """Return whether the client has the rest of this very file, by `If-Range`."""
    if if_range is None or if_range.strip() == etag:
        return True
    return _date(if_range) == modified


def _names(lines: list[str], etag: str, *, weak: bool) -> bool:
    tags = ", ".join(lines)
    found = [tag.removeprefix("W/") if weak else tag for tag in _ETAG.findall(tags)]
    return tags.strip() == "*" or etag in found


def _date(header: str | None) -> datetime | None:
    """Return the date in a header; None if it is missing or malformed, and so to be ignored."""
    try:
        date = parsedate_to_datetime(header or "")
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
