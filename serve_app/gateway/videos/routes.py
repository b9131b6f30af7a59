"""The routes of `/v1/videos`. Each turns HTTP into one call of `Videos`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ValidationError

from serve_app.errors import InvalidRequest
from serve_app.gateway.http import content
from serve_app.gateway.http.auth import Creator, Reader, bearer
from serve_app.gateway.http.envelope import ErrorEnvelope
from serve_app.gateway.http.errors import RESPONSES, ApiError
from serve_app.gateway.http.forms import read_fields
from serve_app.gateway.http.routing import Routes
from serve_app.gateway.videos import sse
from serve_app.gateway.videos.schemas import CreateVideo, Remix, Variant, Video, VideoDeleted, VideoList
from serve_app.gateway.videos.service import Videos, no_video
from serve_app.spelling import unknown_field
from serve_app.storage import download_name

_ENDED: dict[int | str, dict[str, Any]] = {409: {"model": ErrorEnvelope, "description": "The video has no content."}}
_CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorEnvelope, "description": "`Idempotency-Key` was used for another request."}
}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Each change of the video, up to its end.", "content": {"text/event-stream": {}}},
    204: {"description": "The client has seen the last event, by `Last-Event-ID`."},
    503: {"model": ErrorEnvelope, "description": "Too many clients follow videos here."},
}
_KINDS: dict[str, Any] = {
    kind: {} for kind in ("video/mp4", "video/webm", "image/jpeg", "image/webp", "image/gif", "application/zip")
}
_FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file.", "content": _KINDS},
    206: {"description": "Part of the file."},
    302: {"description": "A link to the storage. It works for a limited time, for anyone who has it."},
    304: {"description": "The client has this file already, by `If-None-Match` or `If-Modified-Since`."},
    412: {
        "model": ErrorEnvelope,
        "description": "The file is not the one that `If-Match` or `If-Unmodified-Since` asks for.",
    },
    416: {"model": ErrorEnvelope, "description": "The range lies outside the file."},
    503: {"model": ErrorEnvelope, "description": "The storage does not answer."},
}


def _body(model: type[BaseModel], *kinds: str) -> dict[str, Any]:
    """Return the OpenAPI of a body that the route reads itself, because it may be JSON or a form."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}}


IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern="^[ -~]+$",
        description="A name for this request, which makes it idempotent: a retry with the same name returns the same "
        "video. Another request with that name is refused with 409. A name is kept as long as its video exists.",
    ),
]


def router(videos: Videos) -> APIRouter:
    """Return the routes of the videos API."""
    routes = Routes(tags=["videos"], responses=RESPONSES, dependencies=bearer(videos.config.auth))
    streams = sse.Streams(videos.config.gateway.max_ongoing_requests // 2)

    @routes.post(
        "/v1/videos", responses=_CONFLICT, openapi_extra=_body(CreateVideo, "application/json", "multipart/form-data")
    )
    async def create(request: Request, who: Creator, idempotency_key: IdempotencyKey = None) -> Video:
        """Queue a video. The answer holds all parameters with their values, including the seed that was drawn."""
        fields, typed = await read_fields(request)
        return await videos.submit(fields, typed=typed, who=who, idempotency_key=idempotency_key)

    @routes.get("/v1/videos")
    async def list_videos(
        who: Reader,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """List videos by age, page by page."""
        return await videos.list(after, limit, order, who)

    for path, what in (("edits", "Editing"), ("extensions", "Extending"), ("characters", "Characters")):
        routes.add_api_route(f"/v1/videos/{path}", _unsupported(what), methods=["POST"], name=path, response_model=None)
    routes.get("/v1/videos/characters/{character_id}", name="character", response_model=None)(
        _unsupported("Characters")
    )

    @routes.get("/v1/videos/{video_id}")
    async def retrieve(video_id: str, who: Reader, response: Response) -> Video:
        """Return a video: its state and its parameters."""
        video = await videos.get(video_id, who)
        if video is None:
            raise no_video(video_id)
        if video.status in ("queued", "in_progress"):
            response.headers["openai-poll-after-ms"] = str(_poll_after_ms(video))
        return video

    @routes.delete("/v1/videos/{video_id}")
    async def delete(video_id: str, who: Creator) -> VideoDeleted:
        """Delete a video and its files. If it is running, it is stopped."""
        if not await videos.delete(video_id, who):
            raise no_video(video_id)
        return VideoDeleted(id=video_id)

    @routes.post("/v1/videos/{video_id}/cancel")
    async def cancel(video_id: str, who: Creator) -> Video:
        """Cancel a video that waits or runs. It ends as `failed` with `error.code` `cancelled`."""
        video = await videos.cancel(video_id, who)
        if video is None:
            raise no_video(video_id)
        return video

    @routes.post("/v1/videos/{video_id}/remix", responses=_CONFLICT, openapi_extra=_body(Remix, "application/json"))
    async def remix(video_id: str, request: Request, who: Creator, idempotency_key: IdempotencyKey = None) -> Video:
        """Queue a video with the same parameters, seed included, and another prompt."""
        fields, typed = await read_fields(request)
        return await videos.remix(video_id, _remix(fields, typed), who, idempotency_key)

    @routes.get("/v1/videos/{video_id}/events", responses=_EVENTS, response_class=Response)
    async def events(
        video_id: str,
        request: Request,
        who: Reader,
        last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
    ) -> Response:
        """Stream the video as Server-Sent Events: its state now and after each change.

        Each event is named after the status. The last one is `completed`, `failed` or `deleted`.
        """
        video = await videos.get(video_id, who)
        if video is None:
            raise no_video(video_id)
        if sse.is_end(video, last_event_id):
            return Response(status_code=204)
        streams.check_not_full()
        # Neither cached, nor buffered by a proxy.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        if request.method == "HEAD":
            return StreamingResponse(iter(()), headers=headers, media_type="text/event-stream")
        text = streams.stream(video_id, videos.watch(video_id), last_event_id)
        return StreamingResponse(text, headers=headers, media_type="text/event-stream")

    @routes.get("/v1/videos/{video_id}/content", responses={**_ENDED, **_FILE}, response_class=Response)
    async def get_content(video_id: str, request: Request, who: Reader, variant: Variant = "video") -> Response:
        """Download a completed video, or one of its other files.

        `plain` is the video as it was decoded, where `video` was finished.

        Obeys `Range`, `If-Range`, `If-None-Match`, `If-Modified-Since`, `If-Match` and `If-Unmodified-Since`.
        """
        key, stat = await videos.output(video_id, variant, who)
        head = request.method == "HEAD"
        if (url := await videos.storage.link(key, "HEAD" if head else "GET")) is not None:
            return content.redirect(url)
        name = download_name(video_id, key)
        return content.respond(videos.storage, key, stat, name, request.headers, head=head)

    return routes


def _unsupported(what: str) -> Any:
    async def refuse(who: Creator) -> None:
        raise ApiError(400, "unsupported", f"{what} is not supported: this model makes videos from text only.")

    return refuse


def _remix(fields: dict[str, Any], typed: bool) -> Remix:
    try:
        return Remix.model_validate(fields, strict=typed)
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise InvalidRequest(param, unknown_field(param[:80], ("prompt",))) from None
        raise InvalidRequest(param, f"'{param}': {first['msg']}.") from None


def _poll_after_ms(video: Video) -> int:
    """Return the milliseconds after which a client should ask again: a quarter of the time left, from 100 to 5000.

    So there are few polls at the beginning, and the end is noticed soon. A poll costs the server some milliseconds of
    CPU: on two cores that also do the math, twenty polls a second were measured to add two seconds to a video that
    takes seven (benchmarks/NEGATIVE.md).
    """
    left_s = video.seconds_left if video.seconds_left is not None else 4
    return int(min(max(left_s / 4, 0.1), 5) * 1000)
