"""What the API sends and takes, as OpenAPI shows it. Knows the job table, not HTTP."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.db.tables import Job, Status
from serve_app.parameters import Fields, Priority, Resolved

Variant = Literal["video", "thumbnail", "spritesheet"]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    """The field at fault."""
    code: str | None = None
    """A stable word for programs."""


class ErrorEnvelope(BaseModel):
    """Every answer that is no success."""

    error: ErrorBody


class CreateVideo(Fields):
    """A request for a video. Only `prompt` is needed. In a form, numbers are sent as text."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"prompt": "a red circle moves right"}})


class Remix(BaseModel):
    """The same video with another prompt, in the same class of the queue, without a deadline and at once."""

    model_config = ConfigDict(extra="forbid")

    prompt: str


class VideoError(BaseModel):
    """Why there is no video."""

    code: str
    message: str


class VideoState(BaseModel):
    """The state of a video. The first block is OpenAI's resource, the second is ours."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None = None
    error: VideoError | None = None

    stage: str | None = Field(None, description="`encode`, `denoise` or `decode`, while it runs.")
    step: int = 0
    steps: int = 0
    seconds_left: float | None = Field(
        None, description="Estimate of the time until it is there, from what recent videos took; null if none is known."
    )
    paused: bool = Field(
        False, description="An operator has paused the queue: it waits, and goes on when they resume. Only if `queued`."
    )
    priority: Priority
    deadline_at: int | None = Field(None, description="When work on it ends, finished or not.")
    start_at: int | None = Field(None, description="When work on it begins at the earliest.")
    queue_position: int | None = Field(None, description="1 is next; while it is queued. A more urgent one may come.")
    attempts: int = Field(description="Times that work on it began.")
    owner: str | None = Field(None, description="The id of the API key that created it, where there are keys.")
    revision: str | None = Field(None, description="Of the weights that made it.")
    last_error: VideoError | None = Field(None, description="Why an earlier attempt failed, while another is made.")


class Video(Resolved, VideoState):
    """A video, from the request on: its state, and the parameters that it is made from."""

    started_at: int | None = None
    timings: dict[str, float] = {}
    """Seconds of each stage."""
    warnings: list[str] = Field([], description="What a person should know of it, some of it from the start.")
    size_bytes: int | None = None

    @classmethod
    def of(
        cls, job: Job, queue_position: int | None = None, seconds_left: float | None = None, paused: bool = False
    ) -> Video:
        """The resource of a job.

        Args:
            seconds_left: what is guessed while it waits; a job that runs knows better.
            paused: whether no job begins at the moment.
        """
        error = None
        if job.error_code is not None:
            error = VideoError(code=job.error_code, message=job.error_message or "")
        params: dict[str, Any] = job.params
        return cls(
            **params,
            id=job.id,
            model=job.model,
            status=job.status,
            progress=job.progress,
            created_at=int(job.created_at),
            completed_at=None if job.completed_at is None else int(job.completed_at),
            expires_at=None if job.expires_at is None else int(job.expires_at),
            started_at=None if job.started_at is None else int(job.started_at),
            seconds=f"{params['num_frames'] / params['fps']:g}",
            size=f"{params['width']}x{params['height']}",
            remixed_from_video_id=job.remixed_from,
            error=error if job.status == "failed" else None,
            last_error=None if job.finished else error,
            stage=job.stage,
            step=job.step,
            steps=job.steps,
            seconds_left=job.seconds_left if seconds_left is None else float(round(seconds_left)),
            paused=paused and job.status == "queued",
            priority=job.priority,
            deadline_at=None if job.deadline_at is None else int(job.deadline_at),
            start_at=None if job.start_at is None else int(job.start_at),
            queue_position=queue_position,
            attempts=job.attempt,
            owner=job.owner or None,
            revision=job.revision,
            timings=job.timings,
            warnings=job.warnings,
            size_bytes=job.size_bytes,
        )


class VideoList(BaseModel):
    """A page of videos; the next one starts `after` the `last_id`."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """A video is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ReadyState(BaseModel):
    """The state of a server that accepts jobs."""

    status: Literal["ready", "paused", "degraded"]
    """`ready`: videos are made. Otherwise jobs wait: `paused` by an operator, or `degraded` by what `reason` says."""
    reason: str | None = None


class ModelCard(BaseModel):
    """A model, with what a request may ask for and what it gets when it does not say."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "serve_app"
    limits: dict[str, int]
    defaults: dict[str, int | float | str | None]
    note: str | None = Field(None, description="What it cannot be asked for; null where it takes any prompt.")


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
