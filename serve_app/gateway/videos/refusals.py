"""Counts create requests that are refused, by the error code of their answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serve_app.accounts.keys import OverLimit
from serve_app.db.database import STORE_AWAY
from serve_app.errors import InvalidRequest, Unavailable
from serve_app.gateway.http.errors import ApiError
from serve_app.jobs.store import IdempotencyConflict, QueueFull
from serve_app.metrics import catalog as metrics


@contextmanager
def counted() -> Iterator[None]:
    """Count the exception that ends the context, and raise it."""
    try:
        yield
    except Exception as error:
        metrics.jobs_refused.inc(reason=_reason(error))
        raise


def _reason(error: Exception) -> str:
    """Return the error code of the answer that an exception becomes."""
    match error:
        case ApiError() | OverLimit():
            return error.code
        case InvalidRequest():
            return "invalid_value"
        case QueueFull():
            return "queue_full"
        case IdempotencyConflict():
            return "idempotency_conflict"
    return "unavailable" if isinstance(error, (Unavailable, *STORE_AWAY)) else metrics.OTHER
