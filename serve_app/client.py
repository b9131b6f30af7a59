"""A client for other Ray jobs, by handle calls: blocking, async, or as a stream of progress.

It uses the same durable queue as HTTP: a queued video outlives the job that asked for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.errors import JobFailed, ServeAppError, Unavailable, one_line
from serve_app.request import VideoRequest
from serve_app.whole_file import check_target, whole_file

Variant = Literal["video", "thumbnail", "spritesheet", "plain", "preview", "stills"]


@dataclass(frozen=True)
class Video:
    """A video as the server described it at one moment.

    Attributes:
        info: the resource as HTTP returns it: status, progress, stage, step, seed, timings, ...
    """

    info: dict[str, Any]
    _client: Client

    @property
    def id(self) -> str:
        """The video's id."""
        return str(self.info["id"])

    @property
    def status(self) -> str:
        """The status: `queued`, `in_progress`, `completed` or `failed`."""
        return str(self.info["status"])

    @property
    def finished(self) -> bool:
        """True if the video is completed or has failed."""
        return self.status in ("completed", "failed")

    def content(self, variant: Variant = "video") -> bytes:
        """Return the bytes of the mp4, or of the JPEG of another variant."""
        return b"".join(self._client.content(self.id, variant))

    def save(self, path: str | Path, variant: Variant = "video") -> Path:
        """Write the mp4, or another variant, to a file, and return its path.

        The file appears when it is complete; an older one stays until then.

        Raises:
            ConfigError: no file can be written there.
        """
        target = Path(path)
        check_target(target, "path")
        with whole_file(target) as file:
            for chunk in self._client.content(self.id, variant):
                file.write(chunk)
        return target

    def checked(self) -> Video:
        """Return this video.

        Raises:
            JobFailed: its job failed.
        """
        if self.status == "failed":
            error = self.info.get("error") or {}
            raise JobFailed(error.get("code", "failed"), error.get("message", "the job failed"))
        return self


class Client:
    """A client of a deployment, made by `connect`.

    Every call raises the server's error itself. Any call may also raise `Unavailable` if the server, its database or
    its storage cannot be reached, and `ServeAppError` for a fault of the server.
    """

    def __init__(self, gateway: DeploymentHandle, owner: str = "") -> None:
        self._gateway = gateway
        self._owner = owner
        self._stream = gateway.options(stream=True)

    def submit(self, request: VideoRequest | str, **fields: Any) -> Video:
        """Queue a video and return at once.

        Args:
            request: a request, or its prompt.
            **fields: other fields of `VideoRequest`, such as `priority` and `deadline_s`.

        Raises:
            InvalidRequest: a field cannot work; `param` names it.
            serve_app.jobs.store.QueueFull, serve_app.accounts.keys.OverLimit: try again later; `retry_after_s` says
                when, if that is known.
        """
        with _plain_errors():
            return Video(self._gateway.submit.remote(_fields(request, fields), self._owner).result(), self)

    def generate(self, request: VideoRequest | str, **fields: Any) -> Video:
        """Queue a video and wait until it is completed.

        Raises:
            InvalidRequest: a field cannot work; `param` names it.
            JobFailed: its job failed.
        """
        last: Video | None = None
        for video in self.stream(request, **fields):
            last = video
        return _ended(last)

    async def generate_async(self, request: VideoRequest | str, **fields: Any) -> Video:
        """Do the same as `generate`, in an event loop."""
        last: Video | None = None
        async for video in self.stream_async(request, **fields):
            last = video
        return _ended(last)

    def stream(self, request: VideoRequest | str, **fields: Any) -> Iterator[Video]:
        """Queue a video and yield it after each change, up to its end."""
        video = self.submit(request, **fields)
        with _plain_errors(video.id):
            for info in self._stream.watch.remote(video.id):
                yield Video(info, self)

    async def stream_async(self, request: VideoRequest | str, **fields: Any) -> AsyncIterator[Video]:
        """Do the same as `stream`, in an event loop."""
        with _plain_errors():
            info = await self._gateway.submit.remote(_fields(request, fields), self._owner)
        with _plain_errors(info["id"]):
            async for change in self._stream.watch.remote(info["id"]):
                yield Video(change, self)

    def get(self, video_id: str) -> Video | None:
        """Return the video with an id; None if there is none."""
        with _plain_errors():
            info = self._gateway.get.remote(video_id).result()
        return None if info is None else Video(info, self)

    def content(self, video_id: str, variant: Variant = "video") -> Iterator[bytes]:
        """Yield the bytes of a finished video in chunks."""
        with _plain_errors():
            yield from self._stream.content.remote(video_id, variant)

    def cancel(self, video_id: str) -> bool:
        """Stop a job at its next step. Returns False if there was nothing to stop."""
        with _plain_errors():
            return bool(self._gateway.cancel.remote(video_id).result())

    def delete(self, video_id: str) -> bool:
        """Delete a video and its files. Returns False if there was no such video."""
        with _plain_errors():
            return bool(self._gateway.delete.remote(video_id).result())


def connect(application: str = "gateway", address: str | None = None, owner: str = "") -> Client:
    """Return a client of the deployment on this Ray cluster.

    It needs no API key and sees everybody's videos, since whoever may run code on the cluster is trusted.

    Args:
        application: the name of the gateway's Serve application.
        address: the Ray cluster to join, if this process has joined none; None finds the one around it.
        owner: the id of an API key. The videos belong to it: its holder sees them over HTTP, and its limits hold.

    Raises:
        ServeAppError: no Ray cluster can be reached, or no such application runs there.
    """
    if not ray.is_initialized():
        try:
            ray.init(address=address or "auto", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ServeAppError(f"address has value {address!r}, expected a Ray cluster: {one_line(error)}") from error
    try:
        return Client(serve.get_app_handle(application), owner)
    except Exception as error:
        raise ServeAppError(f"no application {application!r} on this Ray cluster: {one_line(error)}") from error


@contextmanager
def _plain_errors(video_id: str | None = None) -> Iterator[None]:
    """Raise the server's error itself, which Ray raises wrapped in the traceback of the other process.

    Args:
        video_id: a video that goes on at the server, whatever becomes of the call.
    """
    goes_on = "" if video_id is None else f"; {video_id} goes on"
    try:
        yield
    except RayTaskError as error:
        cause: Any = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        if isinstance(cause, ServeAppError):
            raise cause from None
        if isinstance(cause, RayError | RayServeException):
            raise Unavailable(f"the server lost a process: {one_line(cause)}{goes_on}") from None
        raise ServeAppError(
            f"an error of the server's own, its log has the details: {one_line(cause)}{goes_on}"
        ) from None
    except (RayError, RayServeException) as error:
        raise Unavailable(f"the server cannot be reached: {one_line(error)}{goes_on}") from None


def _fields(request: VideoRequest | str, fields: dict[str, Any]) -> dict[str, Any]:
    if isinstance(request, VideoRequest):
        return {**request.model_dump(exclude_none=True), **fields}
    return {"prompt": request, **fields}


def _ended(video: Video | None) -> Video:
    if video is None or not video.finished:
        raise ServeAppError("the server ended the stream before the video")
    return video.checked()
