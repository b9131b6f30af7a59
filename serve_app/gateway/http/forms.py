"""Request bodies as fields: JSON and the two kinds of form. A body that is not UTF-8 is refused."""

from __future__ import annotations

import codecs
import json
from typing import Any
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.requests import Request

from serve_app.errors import InvalidRequest

_FORM, _PARTS, _JSON = "application/x-www-form-urlencoded", "multipart/form-data", "application/json"
_MOST_PARTS = 100
_SEND_JSON = f"send JSON with the header 'Content-Type: {_JSON}'"
_Pairs = list[tuple[str, str | File]]


async def read_fields(request: Request) -> tuple[dict[str, Any], bool]:
    """Return the fields of a body, and whether they are typed (JSON) or text (a form).

    Raises:
        InvalidRequest: the body cannot be read.
    """
    body = await request.body()
    kind, options = _kind(request)
    if kind not in (_FORM, _PARTS):
        check_json(request, body, f" or {_PARTS}")
        return _object(body), True
    # A form begins with a name or a boundary. `curl -d` with JSON, but without the header, sends this.
    if body.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"{", b"[")):
        raise InvalidRequest(None, f"The body looks like JSON, but Content-Type is {kind}: {_SEND_JSON}.")
    _check_charset(options)
    pairs = _form(body) if kind == _FORM else _parts(body, options.get(b"boundary"))
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise InvalidRequest(name, f"{_shown(name)} is given twice.")
        if isinstance(value, File) and name != "input_reference":
            raise InvalidRequest(name, f"{_shown(name)} is a file, expected text.")
        fields[name] = value
    return fields, False


def check_json(request: Request, body: bytes, others: str = "") -> None:
    """Check that a body is declared as JSON, and is UTF-8.

    A web page of another site cannot declare JSON without a preflight request, so this keeps such pages out.

    Args:
        request: the request.
        body: its body.
        others: other media types that the route takes, for the message.

    Raises:
        InvalidRequest: it is not declared as JSON, or not UTF-8.
    """
    declared = request.headers.get("content-type")
    kind, options = _kind(request)
    if kind != _JSON and (body or declared):
        said = "The header Content-Type is missing" if declared is None else f"Content-Type is {declared[:80]!r}"
        raise InvalidRequest(None, f"{said}, expected {_JSON}{others}: {_SEND_JSON}.")
    _check_charset(options)
    _utf8(body, "The body")


def _object(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise InvalidRequest(None, f"The body is empty: {_SEND_JSON}.")
    try:
        fields = json.loads(body.removeprefix(codecs.BOM_UTF8).decode())
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidRequest(None, f"The body is not JSON: {reason}.") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(None, f"The body is a JSON {type(fields).__name__}, expected an object.")
    return fields


def _form(body: bytes) -> _Pairs:
    text = _utf8(body.removeprefix(codecs.BOM_UTF8), "The form")
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MOST_PARTS)
    except UnicodeDecodeError:
        raise InvalidRequest(None, "The form is not UTF-8, expected percent-encoded UTF-8.") from None
    except ValueError:
        raise _too_many() from None
    return list(pairs)


def _parts(body: bytes, boundary: bytes | None) -> _Pairs:
    pairs: _Pairs = []

    def add(field: Field | File) -> None:
        if len(pairs) == _MOST_PARTS:
            raise _too_many()
        name = _utf8(field.field_name or b"", "A name in the form")
        if isinstance(field, Field):
            pairs.append((name, _text(name, field)))
        # Browsers send an unused file input as a file without name and content.
        elif _utf8(field.file_name or b"", f"The file name of {_shown(name)}") or field.size:
            pairs.append((name, field))

    ends: list[bool] = []
    if not boundary:
        raise InvalidRequest(None, f"The body is not a form: Content-Type is {_PARTS} without a boundary.")
    try:
        # The body is in memory anyway, so the parser need not write files to disk.
        options = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
        parser = FormParser(_PARTS, add, add, lambda: ends.append(True), boundary=boundary, config=options)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidRequest(None, f"The body is not a form: {reason}.") from None
    if not ends:
        raise InvalidRequest(None, "The body is not a form: it ends before its last boundary.")
    return pairs


def _text(name: str, field: Field) -> str:
    """Return the text of a part, in the charset that its header names."""
    value = field.value or b""
    charset = parse_options_header(field.content_type)[1].get(b"charset", b"").decode("latin-1")
    if not charset:
        return _utf8(value, _shown(name))
    try:
        return value.decode(charset)
    except (LookupError, UnicodeError):
        raise InvalidRequest(name, f"{_shown(name)} cannot be read as {charset[:40]!r}, expected UTF-8.") from None


def _kind(request: Request) -> tuple[str, dict[bytes, bytes]]:
    """Return the media type of a body, empty if none is given, and its parameters."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    return kind.decode("latin-1"), options


def _check_charset(options: dict[bytes, bytes]) -> None:
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    try:
        known = codecs.lookup(charset).name in ("utf-8", "ascii")
    except LookupError:
        known = False
    if not known:
        raise InvalidRequest(None, f"Content-Type has charset {charset[:40]!r}, expected utf-8.")


def _utf8(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(None, f"{what} is not UTF-8: {error.reason} at byte {error.start}.") from None


def _shown(name: str) -> str:
    return f"'{name[:80]}'"


def _too_many() -> InvalidRequest:
    return InvalidRequest(None, f"The form has too many fields, expected at most {_MOST_PARTS}.")
