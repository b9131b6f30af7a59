"""Middleware around every request: a request id, a URL in UTF-8, a limit on the body, and an envelope for bugs."""

from __future__ import annotations

import re
import secrets
from urllib.parse import quote_from_bytes, unquote_to_bytes

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.gateway.http.errors import ApiError, internal_error
from serve_app.logs import get_logger

logger = get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_ASCII = bytes(range(128))


class Exchange:
    """ASGI middleware for every request.

    Args:
        app: application below.
        body_bytes: largest size of a body; larger ones are answered 413. Bytes are counted as they arrive, since a
            chunked body does not announce its size, and Serve's proxy has no limit.
        answer_request_id: whether to send `x-request-id`. Serve's proxy sends its own, and passes it on to us.
    """

    def __init__(self, app: ASGIApp, body_bytes: int, answer_request_id: bool = True) -> None:
        self._app = app
        self._body_bytes = body_bytes
        self._answer_request_id = answer_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, within its frame."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = f"req_{secrets.token_hex(12)}"
        too_large = HTTPException(413, f"The body is too large, expected at most {self._body_bytes} bytes.")
        announced = headers.get("content-length", "")
        refuse = announced.isdecimal() and int(announced[:18]) > self._body_bytes
        received = 0
        started = False

        async def bounded() -> Message:
            nonlocal received
            if refuse:
                raise too_large
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._body_bytes:
                raise too_large
            return message

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._answer_request_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        fields = {"request": request_id, "method": scope["method"], "path": scope["path"]}
        try:
            if (refusal := _refusal(scope, headers)) is not None:
                await refusal.response()(scope, receive, answer)
                return
            # Raw UTF-8 in a query means the same as percent-encoded UTF-8, but frameworks read it as Latin-1.
            query = quote_from_bytes(scope.get("query_string", b""), _ASCII).encode()
            await self._app({**scope, "query_string": query}, bounded, answer)
        except ClientDisconnect:
            logger.info("client left", extra=fields)
        except Exception as error:
            logger.exception("request failed", extra={**fields, "error": type(error).__name__})
            if started:
                raise  # the answer is cut short, so the server must close the connection
            await internal_error().response()(scope, receive, answer)


def _refusal(scope: Scope, headers: Headers) -> ApiError | None:
    """Return the error for a request that no route could read; None if there is no such error."""
    coding = headers.get("content-encoding", "identity")
    if coding.strip().lower() not in ("identity", ""):
        message = f"Content-Encoding is {coding[:80]!r}, expected a body that is not compressed."
        return ApiError(415, "unsupported_encoding", message, accept_encoding="identity")
    for name, value in (("path", scope.get("raw_path")), ("query", scope.get("query_string"))):
        try:
            unquote_to_bytes(value or b"").decode()
        except UnicodeDecodeError:
            return ApiError(400, "invalid_value", f"The {name} of the URL is not UTF-8.")
    return None
