"""Errors as OpenAI's envelope, for everything that can go wrong between a client and a route."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from serve_app.accounts.keys import OverLimit
from serve_app.db.database import STORE_AWAY
from serve_app.errors import InvalidRequest, Unavailable, one_line
from serve_app.gateway.videos.schemas import ErrorEnvelope
from serve_app.jobs.store import IdempotencyConflict, QueueFull
from serve_app.logs import get_logger

logger = get_logger(__name__)

# Where nothing is known: a queue of videos moves by one in seconds to minutes; sooner a retry only adds load.
RETRY_AFTER_S = 5.0
# A client that waits for longer than this is better told to give up; the openai SDK is of the same opinion.
_LONGEST_RETRY_AFTER_S = 120

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope, "description": text}
    for status, text in (
        (400, "The request is at fault; `param` names the field."),
        (401, "The key is missing, unknown or revoked."),
        (403, "The key lacks the scope, or the server is not open to this network, name or web page."),
        (404, "There is no such video."),
        (413, "The body is too large."),
        (415, "The body is compressed."),
        (429, "Too much at once: `Retry-After` says when to come back."),
        (500, "An error of ours."),
        (503, "The job store or the storage cannot be reached or is full; `Retry-After` says when to ask again."),
    )
}


class ApiError(Exception):
    """An answer in OpenAI's envelope.

    Args:
        retry: whether the same request may succeed later; the openai SDK obeys `x-should-retry`.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, *, retry: bool = False, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry = status, code, message, param, retry
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> JSONResponse:
        """The answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        # What a client sent may hold what UTF-8 cannot say, and we quote it.
        message, param = (
            None if said is None else said.encode("utf-8", "replace").decode() for said in (self.message, self.param)
        )
        body = {"message": message, "type": kind, "param": param, "code": self.code}
        headers = {**self.headers, "x-should-retry": "true" if self.retry else "false"}
        return JSONResponse({"error": body}, self.status, headers=headers)


def no_video(video_id: str) -> ApiError:
    """404. The id is shortened: it may be anything."""
    return ApiError(404, "not_found", f"There is no video {video_id[:80]!r}.", "video_id")


def too_much(code: str, message: str, retry_after_s: float | None) -> ApiError:
    """429. A retry within minutes is invited only where it can help."""
    wait_s = RETRY_AFTER_S if retry_after_s is None else retry_after_s
    retry = wait_s <= _LONGEST_RETRY_AFTER_S
    return ApiError(429, code, message, retry=retry, retry_after=str(max(math.ceil(wait_s), 1)))


def internal_error() -> ApiError:
    """500. Not to be retried: most are bugs, and after a create nobody knows whether the job is in the queue."""
    return ApiError(500, "internal_error", "An internal error; the server's log has the details.")


def unavailable(message: str, *, retry: bool) -> ApiError:
    """503."""
    return ApiError(503, "unavailable", message, retry=retry, retry_after=str(math.ceil(RETRY_AFTER_S)))


async def _away(request: Request, error: Exception) -> JSONResponse:
    """Store or storage did not answer. Whether a create was written down nobody knows then, so it is not repeated
    unasked unless it has a name to be recognised by.
    """
    if isinstance(error, IntegrityError | ProgrammingError | DataError):  # a defect of ours, not of theirs
        logger.exception("database refused", exc_info=error)
        return internal_error().response()
    logger.warning("store or storage away", extra={"path": request.url.path, "error": one_line(error)})
    harmless = request.method != "POST" or "idempotency-key" in request.headers
    message = f"The job store or the storage cannot be reached or is full: {reason(error)}."
    return unavailable(message, retry=harmless).response()


def reason(error: Exception) -> str:
    """Return what the driver says, without our statement and its parameters."""
    return one_line(getattr(error, "orig", None) or error)


def _allowed_methods(request: Request) -> str:
    """Return the methods that a path takes, as the header `Allow` lists them."""

    def takes(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] == Match.FULL for route in request.app.routes)

    return ", ".join(filter(takes, _METHODS))


def install(app: FastAPI) -> None:
    """Make `app` answer every error in the envelope."""

    @app.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(InvalidRequest)
    async def _invalid(_: Request, error: InvalidRequest) -> JSONResponse:
        return ApiError(400, "invalid_value", error.message, error.param).response()

    @app.exception_handler(QueueFull)
    async def _full(_: Request, error: QueueFull) -> JSONResponse:
        return too_much("queue_full", str(error), error.retry_after_s).response()

    @app.exception_handler(OverLimit)
    async def _over_limit(_: Request, error: OverLimit) -> JSONResponse:
        return too_much(error.code, error.message, error.retry_after_s).response()

    @app.exception_handler(IdempotencyConflict)
    async def _conflict(_: Request, error: IdempotencyConflict) -> JSONResponse:
        return ApiError(409, "idempotency_conflict", str(error), "Idempotency-Key").response()

    @app.exception_handler(Unavailable)
    async def _unavailable(_: Request, error: Unavailable) -> JSONResponse:
        return unavailable(str(error), retry=True).response()

    for kind in STORE_AWAY:
        app.add_exception_handler(kind, _away)

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = next((part for part in reversed(first["loc"]) if isinstance(part, str)), None)
        value = repr(first.get("input"))[:80]
        return ApiError(400, "invalid_value", f"'{name}' has value {value}: {first['msg']}.", name).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        headers = dict(error.headers or {})
        if error.status_code == 404:
            message = f"There is no {request.url.path[:200]!r}."
        elif error.status_code == 405:
            message = f"{request.method} is not allowed on {request.url.path[:200]!r}."
            headers["Allow"] = _allowed_methods(request)  # the router knows those of one route only
        answer = ApiError(error.status_code, _CODES.get(error.status_code, "invalid_request"), message)
        answer.headers.update(headers)
        return answer.response()
