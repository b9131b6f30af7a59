"""The body of every error, as OpenAPI shows it."""

from __future__ import annotations

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """Description of an error."""

    message: str
    type: str
    param: str | None = None
    """The field at fault."""
    code: str | None = None
    """A stable word for programs."""
    earliest_s: float | None = None
    """With `deadline_infeasible`: seconds from now after which the video can be expected."""


class ErrorEnvelope(BaseModel):
    """The body of every answer that reports an error."""

    error: ErrorBody
