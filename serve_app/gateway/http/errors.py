"""Errors in OpenAI's envelope, for everything that can go wrong between a client and a route."""

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
from serve_app.errors import DeadlineInfeasible, InvalidRequest, Unavailable, one_line
from serve_app.gateway.http.envelope import ErrorEnvelope
from serve_app.jobs.store import IdempotencyConflict, QueueFull
from serve_app.logs import get_logger

logger = get_logger(__name__)

# Used if nothing better is known. A queue of videos moves in seconds to minutes, so an earlier retry only adds load.
RETRY_AFTER_S = 5.0
# A client that would wait for longer is told to give up; the openai SDK draws the line here as well.
_LONGEST_RETRY_AFTER_S = 120

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}

RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope, "description": text}
    for status, text in (
        (400, "The request is wrong; `param` names the field."),
        (401, "The key is missing, unknown or revoked."),
        (403, "The key lacks the scope, or the server does not accept calls from this network, host name or web page."),
        (404, "There is no such video, or it belongs to another key."),
        (413, "The body is too large."),
        (415, "The body is compressed."),
        (422, "The deadline cannot be met; `earliest_s` says when the video can be expected."),
        (429, "A limit is reached; `Retry-After` says when to try again."),
        (500, "A bug in the server."),
        (503, "The job store or the storage cannot be reached or is full; `Retry-After` says when to try again."),
    )
}


class ApiError(Exception):
    """An error answer in OpenAI's envelope.

    Attributes:
        more: further fields of the error.

    Args:
        status: HTTP status.
        code: stable word for programs.
        message: sentence for people.
        param: field at fault.
        retry: whether the same request may succeed later, as the header `x-should-retry` says; the openai SDK obeys it.
        headers: further headers, with `_` for `-`.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, *, retry: bool = False, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry = status, code, message, param, retry
        self.more: dict[str, float] = {}
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> JSONResponse:
        """Return the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        # The message may quote input of the client that UTF-8 cannot encode.
        message, param = (
            None if said is None else said.encode("utf-8", "replace").decode() for said in (self.message, self.param)
        )
        body = {"message": message, "type": kind, "param": param, "code": self.code, **self.more}
        headers = {**self.headers, "x-should-retry": "true" if self.retry else "false"}
        return JSONResponse({"error": body}, self.status, headers=headers)


def too_much(code: str, message: str, retry_after_s: float | None) -> ApiError:
    """Return a 429. It invites a retry only if one within two minutes can succeed."""
    wait_s = RETRY_AFTER_S if retry_after_s is None else retry_after_s
    retry = wait_s <= _LONGEST_RETRY_AFTER_S
    return ApiError(429, code, message, retry=retry, retry_after=str(max(math.ceil(wait_s), 1)))


def internal_error() -> ApiError:
    """Return a 500. It invites no retry: most are bugs, and after a create the job may be in the queue or not."""
    return ApiError(500, "internal_error", "An internal error; the server's log has the details.")


def unavailable(message: str, *, retry: bool) -> ApiError:
    """Return a 503 with `Retry-After`."""
    return ApiError(503, "unavailable", message, retry=retry, retry_after=str(math.ceil(RETRY_AFTER_S)))


async def _away(request: Request, error: Exception) -> JSONResponse:
    """Answer 503 when the store or the storage failed.

    A create may have been written down or not. So a retry of it is invited only if it has an idempotency key.
    """
    if isinstance(error, IntegrityError | ProgrammingError | DataError):  # a bug of ours, and no outage
        logger.exception("database refused", exc_info=error)
        return internal_error().response()
    logger.warning("store or storage away", extra={"path": request.url.path, "error": one_line(error)})
    harmless = request.method != "POST" or "idempotency-key" in request.headers
    message = f"The job store or the storage cannot be reached or is full: {reason(error)}."
    return unavailable(message, retry=harmless).response()


def reason(error: Exception) -> str:
    """Return the database driver's message, without the SQL statement and its parameters."""
    return one_line(getattr(error, "orig", None) or error)


def _allowed_methods(request: Request) -> str:
    """Return the methods that a path accepts, for the header `Allow`."""

    def takes(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] == Match.FULL for route in request.app.routes)

    return ", ".join(filter(takes, _METHODS))


def install(app: FastAPI) -> None:
    """Make an application answer every error in the envelope."""

    @app.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(DeadlineInfeasible)
    async def _infeasible(_: Request, error: DeadlineInfeasible) -> JSONResponse:
        answer = ApiError(422, "deadline_infeasible", error.message, error.param)
        answer.more["earliest_s"] = error.earliest_s
        return answer.response()

    @app.exception_handler(InvalidRequest)
    async def _invalid(_: Request, error: InvalidRequest) -> JSONResponse:
        return ApiError(400, "invalid_value", error.message, error.param).response()

    @app.exception_handler(QueueFull)
    async def _full(_: Request, error: QueueFull) -> JSONResponse:
        return too_much(error.code, str(error), error.retry_after_s).response()

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
            headers["Allow"] = _allowed_methods(request)  # the router lists those of one route only
        answer = ApiError(error.status_code, _CODES.get(error.status_code, "invalid_request"), message)
        answer.headers.update(headers)
        return answer.response()
