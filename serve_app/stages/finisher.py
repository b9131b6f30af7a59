"""The finisher's deployment: frames in as they are decoded, finished files out."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray import serve

from serve_app.compute import limit_memory, pick_device
from serve_app.config import Config, FinisherConfig
from serve_app.errors import one_line
from serve_app.finish.equipment import Equipment
from serve_app.finish.failure import FinishFailed, FinishStopped
from serve_app.finish.plan import Finish, Interpolate, VideoFormat
from serve_app.logs import get_logger
from serve_app.stages.client_liveness import ClientLiveness
from serve_app.stages.frame_stream import FrameAddress, FrameReceiver, FramesLost
from serve_app.storage import Storage, download_name

if TYPE_CHECKING:
    from serve_app.finish.finisher import FinishedVideo

logger = get_logger(__name__)

# Seconds between two reports of progress.
_REPORT_S = 0.25
# Pauses before a file that could not be stored is stored again; then the plain video has to do.
_STORE_AGAIN_S = (1.0, 5.0, 20.0)


@dataclass(frozen=True)
class FinishRequest:
    """A video to finish.

    Attributes:
        job_id: the job, for file names and logs.
        finish: the steps.
        format: size and length of the decoded video.
        prefix: storage folder of the job's files. The finished ones get a folder of their own in it.
        metadata: what the file says of itself.
    """

    job_id: str
    finish: Finish
    format: VideoFormat
    prefix: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Listening:
    """A finisher has a place for the video, and waits for its frames there."""

    address: FrameAddress


@dataclass(frozen=True)
class FinishProgress:
    """The share of the work that is done, 0 to 1."""

    share: float


@dataclass(frozen=True)
class Finished:
    """A video whose finished files are stored.

    Attributes:
        outputs: storage keys of `video` and of further files by name.
        size_bytes: size of the video's file.
        content_type: its media type.
        format: its size and length.
        seconds: from the first frame to the stored files.
        step_seconds: time that each step was at work.
        warnings: sentences for the user.
    """

    outputs: dict[str, str]
    size_bytes: int
    content_type: str
    format: VideoFormat
    seconds: float
    step_seconds: dict[str, float]
    warnings: list[str]


FinishEvent: TypeAlias = Listening | FinishProgress | Finished


@serve.deployment(name="Finisher")
class Finisher:
    """Answers `finish`.

    Args:
        config: the deployment's configuration.
        made_by: name and revision of the model, for the metadata of files.
        host: IP address to take frames at; that of this host in the cluster if None.
    """

    def __init__(self, config: Config, made_by: dict[str, str], host: str | None = None) -> None:
        stage = config.finisher
        started = time.monotonic()
        self._host = ray.util.get_node_ip_address() if host is None else host
        self._equipment = _equipment(stage)
        if self._equipment.device != "cpu":
            limit_memory(pick_device(self._equipment.device), stage.memory_fraction)
        self._made_by = made_by
        self._storage = Storage(config.storage_options)
        self._threads = ThreadPoolExecutor(stage.max_ongoing_requests, "finish")
        self._client_liveness = ClientLiveness()
        if stage.warmup:
            self._threads.submit(_warm_up).result()
        logger.info("finisher ready", extra={"seconds": round(time.monotonic() - started, 2)})

    async def finish(self, request: FinishRequest, caller: Any = None) -> AsyncIterator[FinishEvent]:
        """Finish a video while its frames come, and store it beside the plain one.

        Ending the iteration early, or the death of the caller, ends the work and leaves no file of it.

        Args:
            request: what to do.
            caller: handle of the process that asks, see `client_liveness`.

        Yields:
            Listening, then FinishProgress, and Finished at the end.

        Raises:
            FinishFailed: it names the step. The plain video is not touched.
        """
        with self._client_liveness.watching(caller):
            request = replace(request, metadata={**self._made_by, **request.metadata})
            work = _Work(request, self._host, self._equipment)
            running = asyncio.create_task(self._run(work))
            try:
                yield Listening(work.address)
                while not (await asyncio.wait([running], timeout=_REPORT_S))[0]:
                    yield FinishProgress(work.share)
                yield await running
            except FinishFailed:
                raise
            except Exception as error:
                known = isinstance(error, FramesLost | OSError)
                logger.warning("not finished", exc_info=not known, extra={"job": request.job_id, "error": str(error)})
                # Passed on as our own type, because a process without a model's library cannot unpickle its errors.
                raise FinishFailed("finish", str(error) if known else one_line(error)) from None
            finally:
                # It cleans up in its own time, however often this call is cancelled meanwhile.
                work.stop()
                running.cancel()
                await asyncio.wait([running])

    async def _run(self, work: _Work) -> Finished:
        making = asyncio.get_running_loop().run_in_executor(self._threads, work.run)
        try:
            return await self._store(work.request, await asyncio.shield(making), work)
        finally:
            # The thread cannot be stopped at any moment, and needs its folder until it ends.
            await asyncio.gather(making, return_exceptions=True)
            work.close()

    async def _store(self, request: FinishRequest, video: FinishedVideo, work: _Work) -> Finished:
        """Store the files, the video last. If cancelled or refused, leave none."""
        # A name that no other try has: one that is late, or being removed, cannot meet this one.
        folder = f"{request.prefix}/finished-{secrets.token_hex(4)}"
        outputs: dict[str, str] = {}
        try:
            for name, path in (*video.extras.items(), ("video", video.path)):
                key = f"{folder}/{name}{path.suffix}"
                await self._put(key, path, request.job_id)
                outputs[name] = key
        except BaseException:
            with suppress(OSError):  # the whole folder goes with the job at the latest
                await asyncio.shield(self._storage.delete_prefix(folder))
            raise
        return Finished(
            outputs,
            video.path.stat().st_size,
            video.content_type,
            video.format,
            work.seconds,
            {step: round(seconds, 3) for step, seconds in video.seconds.items()},
            [*video.warnings],
        )

    async def _put(self, key: str, path: Path, job_id: str) -> None:
        for pause_s in (*_STORE_AGAIN_S, None):
            putting = asyncio.ensure_future(self._storage.put(key, path, download_name(job_id, key)))
            try:
                await asyncio.shield(putting)
                return
            except asyncio.CancelledError:
                # It goes on in its thread, and only a file that is there can be removed.
                await asyncio.gather(putting, return_exceptions=True)
                raise
            except FileExistsError:  # stored by the try before, whose answer was lost
                return
            except OSError as error:
                if pause_s is None:
                    raise
                logger.warning("not stored, tried again", extra={"job": job_id, "error": one_line(error)})
                await asyncio.sleep(pause_s)


class _Work:
    """The finishing of one video in a thread, while its frames arrive."""

    def __init__(self, request: FinishRequest, host: str, equipment: Equipment) -> None:
        self.request = request
        self._folder = TemporaryDirectory(prefix="wan-finish-")
        self._equipment = equipment
        self._stopped = threading.Event()
        self._shares: dict[str, float] = {}
        self._began: float | None = None
        self._receiver = FrameReceiver(host, request.format, Path(self._folder.name))

    @property
    def address(self) -> FrameAddress:
        """The address that takes the frames."""
        return self._receiver.address

    @property
    def share(self) -> float:
        """Share of the frames that all steps have done, 0 to 1."""
        shares = dict(self._shares)
        return min((shares.get(step, 0.0) for step in self.request.finish.steps if step != "label"), default=0.0)

    @property
    def seconds(self) -> float:
        """Seconds since the first frame."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def run(self) -> FinishedVideo:
        """Return the finished video; blocks until its last frame has come and all steps are done."""
        from serve_app.finish.finisher import finish_video

        request = self.request
        return finish_video(
            self._frames(),
            request.format,
            request.finish,
            Path(self._folder.name),
            metadata=request.metadata,
            equipment=self._equipment,
            progress=self._shares.__setitem__,
            stop=self._stopped.is_set,
        )

    def stop(self) -> None:
        """Have `run` end soon."""
        self._stopped.set()
        self._receiver.stop()

    def close(self) -> None:
        """Remove all files. Call it when `run` has ended."""
        self._receiver.close()
        self._folder.cleanup()

    def _frames(self) -> Any:
        for frame in self._receiver.frames():
            self._began = self._began or time.monotonic()
            yield frame


def _equipment(stage: FinisherConfig) -> Equipment:
    device = stage.device if stage.device != "auto" else "cuda" if stage.resources.num_gpus else "cpu"
    return Equipment(
        threads=stage.threads or int(stage.resources.num_cpus),
        device=device,
        upscalers={name: Path(path) for name, path in stage.upscalers.items()},
        interpolators={name: Path(path) for name, path in stage.interpolators.items()},
        certificate=None if stage.certificate is None else Path(stage.certificate),
        private_key=None if stage.private_key is None else Path(stage.private_key),
        timestamp_url=stage.timestamp_url,
        font=None if stage.font is None else Path(stage.font),
    )


def _warm_up() -> None:
    """Finish a video of two frames, so that no request pays for first-time work."""
    import numpy as np

    from serve_app.finish.finisher import finish_video

    frames = iter(np.zeros((2, 64, 64, 3), np.uint8))
    plan = Finish(interpolate=Interpolate(fps=32), order=("interpolate",))
    try:
        with TemporaryDirectory(prefix="wan-finish-") as folder:
            finish_video(frames, VideoFormat(64, 64, 16, 2), plan, Path(folder))
    except (FinishFailed, FinishStopped) as error:  # a request will be told
        logger.error("the warm-up failed", extra={"error": one_line(error)})
