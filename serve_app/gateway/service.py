"""What can be done with videos, whichever way a call came in. Knows neither HTTP nor Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Literal

from serve_app.config import Config
from serve_app.errors import InvalidRequest, JobFailed, one_line
from serve_app.gateway.body import understand
from serve_app.gateway.errors import ApiError, no_video
from serve_app.gateway.intake import Intake
from serve_app.gateway.schemas import Remix, Variant, Video, VideoList
from serve_app.jobs.store import JobStore
from serve_app.jobs.tables import Job
from serve_app.logs import get_logger
from serve_app.request import Urgency, VideoRequest, resolve
from serve_app.storage import Stat, Storage

logger = get_logger(__name__)

Wake = Callable[[], Awaitable[None]]
"""Tells a dispatcher that the store holds something new."""

# Between two looks at a job that somebody watches, in seconds.
_WATCH_S = 0.2


class Videos:
    """Operations on the videos of one store and storage.

    Args:
        wake: may fail; the dispatcher's poll finds the work anyway.
    """

    def __init__(self, config: Config, store: JobStore, storage: Storage, wake: Wake) -> None:
        self.config = config
        self.store = store
        self.storage = storage
        self._wake = wake
        self._intake = Intake(store, storage, config.storage.min_free_mib)

    async def submit(self, fields: dict[str, Any], *, typed: bool = True) -> Video:
        """Check a request and queue it.

        Raises:
            InvalidRequest, ApiError: it is refused. QueueFull, Unavailable: not now.
        """
        params, urgency, notify_email = understand(fields, self.config, typed=typed)
        await self._intake.check()
        job = await self.store.create(
            params,
            self.config.model.name,
            urgency,
            notify_email=notify_email,
            max_queued=self.config.limits.queued_jobs,
        )
        logger.info("created", extra={"job": job.id, "priority": job.priority})
        await self._tell()
        return await self._resource(job)

    async def remix(self, video_id: str, request: Remix) -> Video:
        """Queue the same video, seed and priority included, with another prompt and without a deadline."""
        source = await self._job(video_id)
        params = resolve(VideoRequest(**{**source.params, "prompt": request.prompt}), self.config)
        await self._intake.check()
        job = await self.store.create(
            params,
            self.config.model.name,
            Urgency.model_validate({"priority": source.priority}),
            remixed_from=source.id,
            max_queued=self.config.limits.queued_jobs,
        )
        logger.info("created", extra={"job": job.id, "remix_of": source.id})
        await self._tell()
        return await self._resource(job)

    async def get(self, video_id: str) -> Video | None:
        """The video, or None."""
        job = await self.store.get(video_id)
        return None if job is None else await self._resource(job)

    async def list(self, after: str | None, limit: int, order: Literal["asc", "desc"]) -> VideoList:
        """A page of videos. Queue positions are left out: each would cost a query.

        Raises:
            InvalidRequest: `after` is no id.
        """
        try:
            jobs, has_more = await self.store.list(after, limit, order)
        except LookupError:
            raise InvalidRequest(
                "after", f"'after' has value {repr(after)[:80]}, expected the id of a video."
            ) from None
        data = [Video.of(job) for job in jobs]
        return VideoList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=has_more,
        )

    async def delete(self, video_id: str) -> bool:
        """Remove a video, its files, and the run that may be making it; False if there is none."""
        if not await self.store.delete(video_id):
            return False
        logger.info("deleted", extra={"job": video_id})
        await self._tell()
        return True

    async def cancel(self, video_id: str) -> Video | None:
        """Stop a video that waits or runs; it then ends as failed, `cancelled`. One that has ended stays as it is."""
        job = await self.store.request_cancel(video_id)
        if job is None:
            return None
        logger.info("cancel requested", extra={"job": video_id})
        await self._tell()
        return await self._resource(job)

    async def watch(self, video_id: str) -> AsyncGenerator[Video, None]:
        """The video now and after each change, up to its end.

        Raises:
            InvalidRequest: there is no such video. JobFailed: it was deleted meanwhile.
        """
        last: Video | None = None
        while True:
            video = await self.get(video_id)
            if video is None:
                if last is None:
                    raise InvalidRequest("video_id", f"There is no video {video_id[:80]!r}.")
                raise JobFailed("deleted", "The video was deleted.")
            if video != last:
                yield video
                last = video
            if video.status in ("completed", "failed"):
                return
            await asyncio.sleep(_WATCH_S)

    async def output(self, video_id: str, variant: Variant) -> tuple[str, Stat]:
        """Key and size of a finished video's file.

        Raises:
            ApiError: 404 if there is no such video or variant, 409 if the video is not finished, 503 if the storage
                does not answer.
        """
        job = await self._job(video_id)
        if job.status == "failed":
            message = f"The video failed and has no content: {job.error_message}"
            raise ApiError(409, "video_failed", message, "video_id")
        if job.status != "completed":
            raise ApiError(409, "video_not_ready", f"The video is {job.status}, not completed.", "video_id")
        key = job.outputs.get(variant)
        if key is None:
            raise ApiError(404, "not_found", f"The video has no {variant}.", "variant")
        try:
            return key, await self.storage.stat(key)
        except FileNotFoundError:
            logger.error("output missing", extra={"job": video_id, "key": key})
            raise ApiError(404, "not_found", f"The {variant} is no longer stored.", "variant") from None
        except OSError as error:
            logger.warning("storage unreachable", extra={"job": video_id, "error": one_line(error)})
            raise ApiError(503, "storage_unavailable", "The storage does not answer.", retry=True) from None

    async def _job(self, video_id: str) -> Job:
        job = await self.store.get(video_id)
        if job is None:
            raise no_video(video_id)
        return job

    async def _resource(self, job: Job) -> Video:
        return Video.of(job, await self.store.position(job.id) if job.status == "queued" else None)

    async def _tell(self) -> None:
        try:
            await self._wake()
        except Exception as error:
            logger.warning("dispatcher not told", extra={"error": f"{type(error).__name__}: {error}"[:200]})
