"""Use a running deployment from another Ray job, through handle calls: blocking, async, or as a stream of progress.

Goes through the same durable queue as HTTP: a video that was asked for survives the job that asked.
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

Variant = Literal["video", "thumbnail", "spritesheet"]


@dataclass(frozen=True)
class Video:
    """A video as the server knows it at one moment.

    Attributes:
        info: the resource as HTTP returns it: status, progress, stage, step, seed, timings, ...
    """

    info: dict[str, Any]
    _client: Client

    @property
    def id(self) -> str:
        """Its name on the server."""
        return str(self.info["id"])

    @property
    def status(self) -> str:
        """`queued`, `in_progress`, `completed` or `failed`."""
        return str(self.info["status"])

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ("completed", "failed")

    def content(self, variant: Variant = "video") -> bytes:
        """The mp4, or the JPEG of a variant."""
        return b"".join(self._client.content(self.id, variant))

    def save(self, path: str | Path, variant: Variant = "video") -> Path:
        """Write the mp4, or a variant, to a file. It appears when it is complete; an older one stays until then.

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
        """Itself.

        Raises:
            JobFailed: the job failed.
        """
        if self.status == "failed":
            error = self.info.get("error") or {}
            raise JobFailed(error.get("code", "failed"), error.get("message", "the job failed"))
        return self


class Client:
    """Handle calls to a deployment. Made by `connect`.

    Every call raises the server's error itself. Beside what its own text says: `Unavailable` where the server, its
    store or its storage cannot be reached, and `ServeAppError` for an error of the server's own.
    """

    def __init__(self, gateway: DeploymentHandle, owner: str = "") -> None:
        self._gateway = gateway
        self._owner = owner
        self._stream = gateway.options(stream=True)

    def submit(self, request: VideoRequest | str, **fields: Any) -> Video:
        """Queue a video and return at once.

        Args:
            request: a request, or its prompt with the other fields as keywords: those of `VideoRequest`, `priority`
                and `deadline_s` among them.

        Raises:
            InvalidRequest: the field at fault in `param`.
            serve_app.jobs.store.QueueFull, serve_app.accounts.keys.OverLimit: not now; `retry_after_s` says when, if
                known.
        """
        with _plain_errors():
            return Video(self._gateway.submit.remote(_fields(request, fields), self._owner).result(), self)

    def generate(self, request: VideoRequest | str, **fields: Any) -> Video:
        """Queue a video and wait for it.

        Raises:
            InvalidRequest: the field at fault in `param`.
            JobFailed: the job failed.
        """
        last: Video | None = None
        for video in self.stream(request, **fields):
            last = video
        return _ended(last)

    async def generate_async(self, request: VideoRequest | str, **fields: Any) -> Video:
        """`generate` for an event loop."""
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
        """`stream` for an event loop."""
        with _plain_errors():
            info = await self._gateway.submit.remote(_fields(request, fields), self._owner)
        with _plain_errors(info["id"]):
            async for change in self._stream.watch.remote(info["id"]):
                yield Video(change, self)

    def get(self, video_id: str) -> Video | None:
        """A video by its id; None if there is none."""
        with _plain_errors():
            info = self._gateway.get.remote(video_id).result()
        return None if info is None else Video(info, self)

    def content(self, video_id: str, variant: Variant = "video") -> Iterator[bytes]:
        """A finished video's bytes, in chunks."""
        with _plain_errors():
            yield from self._stream.content.remote(video_id, variant)

    def cancel(self, video_id: str) -> bool:
        """Stop a job at its next step. Returns whether there was something to stop."""
        with _plain_errors():
            return bool(self._gateway.cancel.remote(video_id).result())

    def delete(self, video_id: str) -> bool:
        """Remove a video and its files. Returns whether it was there."""
        with _plain_errors():
            return bool(self._gateway.delete.remote(video_id).result())


def connect(application: str = "gateway", address: str | None = None, owner: str = "") -> Client:
    """A client of the deployment on this Ray cluster. It needs no API key: who may run code here is trusted, and sees
    everybody's videos.

    Args:
        application: name of the gateway's Serve application.
        address: of the Ray cluster, where this process has not joined one; default is the one around it.
        owner: id of the API key whose videos these are: its holder sees them over HTTP, and its limits on jobs hold.

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
    """Raise the server's error itself, where Ray raises it wrapped in the frames of the process that it comes from.

    Args:
        video_id: of the video that goes on at the server, whatever becomes of the call.
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
