"""The gateway as a Serve deployment: HTTP, and the same operations as handle calls for other Ray jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from serve_app.config import Config
from serve_app.db.database import STORE_AWAY
from serve_app.dispatch.rabbitmq import broker
from serve_app.errors import InvalidRequest, Unavailable, one_line
from serve_app.gateway.app import create_app
from serve_app.gateway.http.auth import Caller
from serve_app.gateway.http.errors import ApiError, reason
from serve_app.gateway.videos.schemas import Variant
from serve_app.gateway.videos.service import Videos
from serve_app.jobs.store import JobStore
from serve_app.logs import get_logger
from serve_app.metrics import export
from serve_app.replica import alive_hosts, check_hosts, starting
from serve_app.storage import Storage
from serve_app.wan.cost import video_tflop

logger = get_logger(__name__)


@contextmanager
def _for_handles() -> Iterator[None]:
    """Turn errors of HTTP or of the database driver into our own, which other processes can unpickle."""
    try:
        yield
    except ApiError as error:
        if error.status >= 500:
            raise Unavailable(error.message) from None
        raise InvalidRequest(error.param, error.message) from None
    except STORE_AWAY as error:
        logger.warning("store or storage away", extra={"error": one_line(error)})
        raise Unavailable(f"The job store or the storage cannot be reached or is full: {reason(error)}.") from None


@serve.deployment(name="gateway")
@serve.ingress()
class Gateway:
    """A replica of the gateway. Replicas share only the store and the storage, so any of them can answer any call.

    Args:
        config: all options.
        dispatcher: handle of the dispatcher, which has `wake()`.
        expert: configuration of the experts. Without it there are no estimates of how long jobs wait.
    """

    async def __init__(  # type: ignore[misc]
        self, config: Config, dispatcher: DeploymentHandle, expert: dict[str, Any] | None = None
    ) -> None:
        self._config = config
        self._dispatcher = dispatcher.options()  # finds its replicas now, and not when the first job is created
        with starting():
            check_hosts(config, alive_hosts())
            self._broker = broker(config)
            work_of = None if expert is None else partial(video_tflop, expert)
            self._store = JobStore.of(config, self._broker, work_of)
            await self._store.start()
            self._storage = Storage(config.storage_options)
            await self._storage.check()
        if self._broker is not None:
            self._broker.start()
        if expert is None:
            where = f"model.path has value {config.model.path!r}, which could not be read where this was deployed"
            logger.warning("no estimates of jobs that wait", extra={"reason": where})
        export.start("gateway")
        self._videos = Videos(config, self._store, self._storage, self._wake)

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Built here, not at import, because it depends on the configuration.
        return create_app(self._config, self._store, self._storage, self._wake, self._ready, answer_request_id=False)

    async def submit(self, fields: dict[str, Any], owner: str = "") -> dict[str, Any]:
        """Queue a video, and return its resource.

        Args:
            fields: those of a create request.
            owner: id of the API key whose video it is, and whose limits apply; empty is none.

        Raises:
            InvalidRequest: a field is wrong; `param` names it.
            QueueFull: too many jobs wait.
            OverLimit: the owner has reached a limit.
            Unavailable: no job is accepted now.
        """
        with _for_handles():
            return (await self._videos.submit(fields, who=Caller(owner))).model_dump()

    async def get(self, video_id: str) -> dict[str, Any] | None:
        """Return the resource of a video, or None."""
        with _for_handles():
            video = await self._videos.get(video_id)
            return None if video is None else video.model_dump()

    async def watch(self, video_id: str) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the resource of a video: now and after each change, up to its end.

        Raises:
            InvalidRequest: there is no such video.
            JobFailed: it was deleted meanwhile.
        """
        with _for_handles():
            async for video in self._videos.watch(video_id):
                yield video.model_dump()

    async def content(self, video_id: str, variant: Variant = "video") -> AsyncGenerator[bytes, None]:
        """Yield the mp4, or the JPEG of a variant, in chunks of about 1 MiB.

        Raises:
            InvalidRequest: there is no such file, or not yet.
        """
        with _for_handles():
            key, _ = await self._videos.output(video_id, variant)
            async for chunk in self._storage.stream(key):
                yield chunk

    async def delete(self, video_id: str) -> bool:
        """Delete a video and its files, and stop it if it runs. Return False if there is none."""
        with _for_handles():
            return await self._videos.delete(video_id)

    async def cancel(self, video_id: str) -> bool:
        """Cancel a video. Return whether it was waiting or running."""
        with _for_handles():
            before = await self._videos.get(video_id)
            if before is None or before.status in ("completed", "failed"):
                return False
            return await self._videos.cancel(video_id) is not None

    async def _wake(self) -> None:
        # Not awaited: a create must not wait for a dispatcher, whose poll finds the job if this call is lost.
        self._dispatcher.wake.remote()

    async def _ready(self) -> str | None:
        """Return None if videos can be made now, or else the reason why not.

        Raises:
            Unavailable: as far as Serve knows, no video ever could be made.
        """
        served = (await self._store.rollout()).stable
        name = self._config.dispatcher.pipeline if served is None else served.name
        status = await asyncio.to_thread(serve.status)
        application = status.applications.get(name)
        if application is None:
            raise Unavailable(f"The pipeline application {name!r} is not deployed.")
        if application.status == ApplicationStatus.RUNNING:
            return None
        reason = f"The pipeline application {name!r} is {application.status.value}."
        if application.status == ApplicationStatus.UNHEALTHY:  # Serve calls an application so if it was healthy before
            return reason
        raise Unavailable(reason)

    async def __del__(self) -> None:
        if hasattr(self, "_store"):
            if self._broker is not None:
                await self._broker.close()
            await self._store.close()
