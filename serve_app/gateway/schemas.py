"""The bodies of the routes that are about the server, not about a video, as OpenAPI shows them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ReadyState(BaseModel):
    """The state of a server that accepts jobs."""

    status: Literal["ready", "paused", "degraded"]
    """`ready`: videos are made. Otherwise jobs wait: `paused` by an operator, or `degraded` for the given `reason`."""
    reason: str | None = None


class Estimates(BaseModel):
    """The errors of the estimates of `seconds_left` that the latest videos were created with."""

    videos: int
    """Number of these videos."""
    median_error: float
    """Error that half of them stayed below, as a share of the seconds that they took."""
    p90_error: float
    """Error that nine of ten stayed below."""
    p90_factor: float
    """Factor on an estimate that nine of ten videos keep to; deadlines are checked with it."""


class ModelCard(BaseModel):
    """A model, with the limits and the defaults of requests."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "serve_app"
    limits: dict[str, int]
    defaults: dict[str, int | float | str | None]
    estimates: Estimates | None = Field(None, description="How good estimates were lately. Null while none has ended.")
    note: str | None = Field(None, description="What the model cannot draw. Null if it takes any prompt.")


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
