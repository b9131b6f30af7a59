"""The bodies of the videos API, as OpenAPI shows them. Knows the job table, not HTTP."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.db.tables import Job, Status
from serve_app.finish.plan import Finish
from serve_app.parameters import Fields, Priority, Resolved

Variant = Literal["video", "thumbnail", "spritesheet", "plain", "preview", "stills"]
"""A file of a video. The last three are there only if the video was finished, `preview` and `stills` if asked for."""


class CreateVideo(Fields):
    """A request for a video. Only `prompt` is needed. In a form, numbers are sent as text."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"prompt": "a red circle moves right"}})


class Remix(BaseModel):
    """A new prompt for a video that exists. The priority stays; deadline and start time do not."""

    model_config = ConfigDict(extra="forbid")

    prompt: str


class VideoError(BaseModel):
    """The reason why a video, or an attempt at it, failed."""

    code: str
    message: str


class FinishedFormat(BaseModel):
    """The finished video, which is not of the size and length that the parameters say."""

    width: int
    height: int
    fps: int
    num_frames: int
    content_type: str = Field(description="Media type of the file.")
    seconds: dict[str, float] = Field({}, description="Seconds that each step was at work, some beside each other.")


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

    stage: str | None = Field(None, description="`encode`, `denoise`, `decode` or `finish`; null if it is not running.")
    step: int = 0
    steps: int = 0
    seconds_left: float | None = Field(
        None, description="Estimated seconds until the video is ready, from what recent videos took; null if unknown."
    )
    paused: bool = Field(
        False, description="An operator has paused the queue. The video waits until it is resumed. Only if `queued`."
    )
    priority: Priority
    deadline_at: int | None = Field(None, description="Time after which the video is given up, finished or not.")
    start_at: int | None = Field(None, description="Earliest time at which work on it begins.")
    queue_position: int | None = Field(
        None, description="Place in the queue, 1 is next. It grows if a more urgent video comes. Null if not `queued`."
    )
    degraded: bool = Field(
        False, description="Less was made than was asked for, since the queue was long and the request allows it."
    )
    requested_size: str | None = Field(None, description="With `degraded`: the size that was asked for.")
    requested_steps: int | None = Field(None, description="With `degraded`: the steps that were asked for.")
    attempts: int = Field(description="How often work on it began.")
    owner: str | None = Field(
        None, description="Id of the API key that created it; null if the server asks for no keys."
    )
    revision: str | None = Field(None, description="Revision of the weights that made it.")
    last_error: VideoError | None = Field(None, description="Why the attempt before failed, while another one is made.")


class Video(Resolved, VideoState):
    """A video, from the request on: its state, and the parameters that it is made from."""

    started_at: int | None = None
    timings: dict[str, float] = {}
    """Seconds of each stage."""
    warnings: list[str] = Field([], description="Warnings for people, e.g. a prompt that was cut.")
    size_bytes: int | None = None
    finish: Finish | None = Field(None, description="Steps that finish the decoded video, as asked for.")
    finished: FinishedFormat | None = Field(
        None, description="What the steps made. Null if the video is as it was decoded; `warnings` say why."
    )

    @classmethod
    def of(
        cls, job: Job, queue_position: int | None = None, seconds_left: float | None = None, paused: bool = False
    ) -> Video:
        """Return the resource of a job.

        Args:
            job: its row.
            queue_position: its place in the queue, 1 being next; None if it does not wait.
            seconds_left: estimate for a job that waits; a running job's row holds a better one.
            paused: whether no job begins at the moment.
        """
        error = None
        if job.error_code is not None:
            error = VideoError(code=job.error_code, message=job.error_message or "")
        params: dict[str, Any] = job.params
        asked = job.requested
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
            degraded=job.requested is not None,
            requested_size=None if asked is None else f"{asked['width']}x{asked['height']}",
            requested_steps=None if asked is None else asked["num_inference_steps"],
            attempts=job.attempt,
            owner=job.owner or None,
            revision=job.revision,
            timings=job.timings,
            warnings=job.warnings,
            size_bytes=job.size_bytes,
            finish=job.finish,
            finished=job.finish_result,
        )


class VideoList(BaseModel):
    """A page of videos. For the next page, send its `last_id` as `after`."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    """The answer to a delete."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
