"""The operations on videos, for HTTP calls and handle calls alike. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Literal

from serve_app.config import Config
from serve_app.db.tables import CANCELLED, Job
from serve_app.errors import InvalidRequest, JobFailed, Unavailable, one_line
from serve_app.finish.plan import Finish
from serve_app.gateway.http.auth import Caller
from serve_app.gateway.http.errors import ApiError
from serve_app.gateway.videos.admission import Admission
from serve_app.gateway.videos.body import understand
from serve_app.gateway.videos.refusals import counted
from serve_app.gateway.videos.schemas import Remix, Variant, Video, VideoList
from serve_app.jobs.store import Idempotency, JobStore
from serve_app.logs import get_logger
from serve_app.request import Params, Urgency, VideoRequest, finishing, resolve
from serve_app.storage import Stat, Storage
from serve_app.tiny import vocabulary

logger = get_logger(__name__)

Wake = Callable[[], Awaitable[None]]
"""Tells a dispatcher that there is a new job in the store."""

# A watched job is looked at after a tenth of the time in which nothing changed, within these bounds in seconds: quick
# changes are seen soon, and watching for hours costs little.
_WATCH_S = (0.2, 1.0)
# Handle calls come from inside of the cluster, and are trusted.
_TRUSTED = Caller()


class Videos:
    """Operations on the videos of one store and storage. A caller's error for a video of another key is "not found".

    Args:
        config: all options.
        store: job store.
        storage: where the videos are.
        wake: tells a dispatcher of a new job. It may fail: the dispatcher's poll finds the job anyway.
    """

    def __init__(self, config: Config, store: JobStore, storage: Storage, wake: Wake) -> None:
        self.config = config
        self.store = store
        self.storage = storage
        self._wake = wake
        self.admission = Admission(store, storage, config.storage.min_free_mib)

    async def submit(
        self,
        fields: dict[str, Any],
        *,
        typed: bool = True,
        who: Caller = _TRUSTED,
        idempotency_key: str | None = None,
    ) -> Video:
        """Check a request and queue it.

        Args:
            fields: those of a create request.
            typed: whether numbers are numbers, as in JSON, or text, as in a form.
            who: caller, whose video it becomes.
            idempotency_key: name of the request; a retry with the same name returns the same video.

        Raises:
            InvalidRequest, ApiError, IdempotencyConflict: the request is wrong.
            QueueFull, OverLimit, Unavailable: it cannot be accepted now.
        """
        with counted():
            asked = understand(fields, self.config, typed=typed)
            named = _idempotency(idempotency_key, fields)
            return await self._create(
                asked.params, asked.urgency, who, named, notify_email=asked.notify_email, finish=asked.finish
            )

    async def remix(
        self, video_id: str, request: Remix, who: Caller = _TRUSTED, idempotency_key: str | None = None
    ) -> Video:
        """Queue a video with the parameters, seed, finishing and priority of another one, and a new prompt."""
        source = await self._job(video_id, who)
        with counted():
            again = VideoRequest(**{**source.params, "prompt": request.prompt, "finish": source.finish})
            params = resolve(again, self.config)
            urgency = Urgency.model_validate({"priority": source.priority})
            named = _idempotency(idempotency_key, {"remix": video_id, **request.model_dump()})
            finish = finishing(again, params, self.config)
            return await self._create(params, urgency, who, named, remixed_from=source.id, finish=finish)

    async def _create(
        self,
        params: Params,
        urgency: Urgency,
        who: Caller,
        named: Idempotency | None,
        *,
        remixed_from: str | None = None,
        notify_email: str | None = None,
        finish: Finish | None = None,
    ) -> Video:
        try:
            await self.admission.check_open()
        except Unavailable:
            # A retry of a request that was accepted before still gets its video.
            before = None if named is None else await self.store.known(who.owner, named)
            if before is None:
                raise
            return await self._resource(before)
        job = await self.store.create(
            params,
            self.config.model.name,
            urgency,
            owner=who.owner,
            idempotency=named,
            remixed_from=remixed_from,
            notify_email=notify_email,
            finish=finish,
            warnings=vocabulary.warnings(params.prompt) if self.config.model.bundled else (),
            max_queued=self.config.limits.queued_jobs,
            max_wait_s=getattr(self.config.admission.max_wait_s, urgency.priority),
            check_deadline=self.config.admission.check_deadlines,
        )
        logger.info(
            "created",
            extra={"job": job.id, "owner": job.owner, "priority": job.priority, "remix_of": job.remixed_from},
        )
        await self._wake_dispatcher()
        return await self._resource(job)

    async def get(self, video_id: str, who: Caller = _TRUSTED) -> Video | None:
        """Return a video, or None."""
        job = await self.store.get(video_id, who.sees)
        return None if job is None else await self._resource(job)

    async def list(
        self, after: str | None, limit: int, order: Literal["asc", "desc"], who: Caller = _TRUSTED
    ) -> VideoList:
        """Return a page of videos, without their queue positions: each would cost a query.

        Raises:
            InvalidRequest: `after` is not the id of a video.
        """
        try:
            jobs, has_more = await self.store.list(after, limit, order, who.sees)
        except LookupError:
            raise InvalidRequest(
                "after", f"'after' has value {repr(after)[:80]}, expected the id of a video."
            ) from None
        paused = any(job.status == "queued" for job in jobs) and await self.store.paused_since() is not None
        data = [Video.of(job, paused=paused) for job in jobs]
        return VideoList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=has_more,
        )

    async def delete(self, video_id: str, who: Caller = _TRUSTED) -> bool:
        """Delete a video and its files, and stop it if it runs. Return False if there is none."""
        if not await self.store.delete(video_id, who.sees):
            return False
        logger.info("deleted", extra={"job": video_id})
        await self._wake_dispatcher()
        return True

    async def cancel(self, video_id: str, who: Caller = _TRUSTED) -> Video | None:
        """Cancel a video that waits or runs. It ends as failed, `cancelled`. An ended one stays as it is."""
        job = await self.store.request_cancel(video_id, who.sees)
        if job is None:
            return None
        logger.info("cancel requested", extra={"job": video_id})
        await self._wake_dispatcher()
        return await self._resource(job)

    async def watch(self, video_id: str) -> AsyncGenerator[Video, None]:
        """Yield a video: its state now and after each change, up to its end.

        Raises:
            InvalidRequest: there is no such video.
            JobFailed: it was deleted meanwhile.
        """
        last: Video | None = None
        changed_at = time.monotonic()
        while True:
            video = await self.get(video_id)
            if video is None:
                if last is None:
                    raise InvalidRequest("video_id", f"There is no video {video_id[:80]!r}.")
                raise JobFailed("deleted", "The video was deleted.")
            if video != last:
                yield video
                last, changed_at = video, time.monotonic()
            if video.status in ("completed", "failed"):
                return
            least, most = _WATCH_S
            await asyncio.sleep(min(max((time.monotonic() - changed_at) / 10, least), most))

    async def output(self, video_id: str, variant: Variant, who: Caller = _TRUSTED) -> tuple[str, Stat]:
        """Return storage key and size of a finished video's file.

        Raises:
            ApiError: 404, there is no such video or variant; 409, the video is not finished; 503, the storage does not
                answer.
        """
        job = await self._job(video_id, who)
        if job.shown_status == CANCELLED:
            raise ApiError(409, "video_failed", "The video was cancelled and has no content.", "video_id")
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

    async def _job(self, video_id: str, who: Caller) -> Job:
        job = await self.store.get(video_id, who.sees)
        if job is None:
            raise no_video(video_id)
        return job

    async def _resource(self, job: Job) -> Video:
        if job.status == "in_progress":
            return Video.of(job, seconds_left=await self.store.seconds_left(job))
        if job.status != "queued":
            return Video.of(job)
        # The job may leave the queue between the queries: then it has no position.
        position, paused = await self.store.position(job.id), await self.store.paused_since() is not None
        # There is no estimate during a pause, which lasts until an operator ends it.
        return Video.of(job, position, None if paused else await self.store.seconds_left(job), paused)

    async def _wake_dispatcher(self) -> None:
        try:
            await self._wake()
        except Exception as error:
            logger.warning("dispatcher not woken", extra={"error": f"{type(error).__name__}: {error}"[:200]})


def _idempotency(key: str | None, fields: dict[str, Any]) -> Idempotency | None:
    """Return name and digest of a request. Fields are digested, not bytes: the boundary of a form differs each time."""
    if key is None:
        return None
    said = json.dumps(fields, sort_keys=True, default=str)
    return Idempotency(key, hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest())


def no_video(video_id: str) -> ApiError:
    """Return a 404 that names the video; the id is shortened, since it may be any text."""
    return ApiError(404, "not_found", f"There is no video {video_id[:80]!r}.", "video_id")
