"""The finishing of one video as the pipeline sees it: begun before the decode, fed by it, awaited after it.

Whatever goes wrong here costs the finished video only: the plain one is stored by the decoder, and stays.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException

from serve_app.errors import one_line
from serve_app.events import Done
from serve_app.finish.failure import FinishFailed
from serve_app.finish.plan import VideoFormat
from serve_app.logs import get_logger
from serve_app.replica import this_process
from serve_app.stages.finisher import Finished, FinishProgress, FinishRequest, Listening
from serve_app.stages.frame_stream import FrameAddress

logger = get_logger(__name__)

# Weight of the newest video in the running mean of seconds per pixel.
_NEWEST = 0.3
# Pause before another finisher is asked, where one was lost before it listened.
_ASK_AGAIN_S = 0.2
_SAID = "The video is as it was decoded, because it could not be finished: {}."


class Pace:
    """The running mean of the seconds that a pixel takes. Knows nothing until it has learnt."""

    def __init__(self) -> None:
        self._s_per_pixel = 0.0

    def seconds(self, format: VideoFormat) -> float:
        """Return the seconds that a video of this size and length is expected to take; 0 if that is unknown."""
        return self._s_per_pixel * _pixels(format)

    def learn(self, seconds: float, format: VideoFormat) -> None:
        """Take a video that took so long into the mean."""
        measured, known = seconds / _pixels(format), self._s_per_pixel
        self._s_per_pixel = known + _NEWEST * (measured - known) if known else measured


class Finishing:
    """A call of the finisher, and what has come of it.

    Args:
        finisher: handle of the deployment, which streams; None if there is none.
        request: what it is to do.
        wait_s: for how long a finisher with a free place is waited for.
        progress_timeout_s: for how long nothing may happen, once all frames are sent.

    Attributes:
        made: size and length of the video that is to be made.
        finished: the stored video; None before the end, and if there will be none.
        warning: sentence for the user, if there will be no finished video.
    """

    def __init__(self, finisher: Any, request: FinishRequest, wait_s: float, progress_timeout_s: float) -> None:
        self._finisher = finisher
        self._request = request
        self._wait_s = wait_s
        self._progress_timeout_s = progress_timeout_s
        self._call: _Call | None = None
        self.made = request.format
        self.finished: Finished | None = None
        self.warning: str | None = None
        try:
            self.made = request.finish.result(request.format)
        except ValueError as error:
            self._give_up(str(error))
        if finisher is None:
            self._give_up("this pipeline has no finisher (`finisher.enabled`)")

    def begin(self) -> None:
        """Ask for a finisher, if none has been asked; returns at once."""
        if self._call is None and self.warning is None:
            self._call = _Call(self._finisher, self._request)

    async def address(self) -> FrameAddress | None:
        """Return where the frames go, as soon as a finisher has a place; None if none has within `wait_s`.

        A finisher that was lost before it got frames has cost nothing, and another one is asked.
        """
        until = time.monotonic() + self._wait_s
        while self.warning is None:
            self.begin()
            assert self._call is not None
            if await self._call.listens(until - time.monotonic()):
                return self._call.address
            reason = self._call.failure
            if reason is None:
                self._give_up(f"no finisher had a free place within {self._wait_s:g} s")
            elif not self._call.lost or time.monotonic() > until:
                self._give_up(reason)
            else:
                self._call = None
                await asyncio.sleep(_ASK_AGAIN_S)
        return None

    async def follow(self) -> AsyncIterator[float]:
        """Yield the share that is done after each report, up to the end. Sets `finished` or `warning`."""
        while self.warning is None and self._call is not None:
            if not await self._call.changes(self._progress_timeout_s):
                self._give_up(f"nothing happened for {self._progress_timeout_s:g} s")
            elif self._call.failure is not None:
                self._give_up(self._call.failure)
            elif self._call.finished is not None:
                self.finished = self._call.finished
                return
            else:
                yield self._call.share

    def pace_of(self, paces: Mapping[Any, Pace]) -> Pace:
        """Return the pace of videos with these steps, of those by kinds of steps."""
        finish = self._request.finish
        models = tuple(part.model for part in (finish.interpolate, finish.upscale) if part is not None)
        return paces[finish.order, models, None if finish.encode is None else finish.encode.codec]

    def add_to(self, done: Done, num_gpus: float) -> Done:
        """Return the end of a job with what has come of the finishing in it.

        Args:
            done: the end with the plain video.
            num_gpus: GPUs that a finisher has.
        """
        made = self.finished
        if made is None:
            return replace(done, warnings=[*done.warnings, *filter(None, [self.warning])])
        return replace(
            done,
            outputs={**done.outputs, "plain": done.outputs["video"], **made.outputs},
            timings={**done.timings, "finish": made.seconds},
            size_bytes=made.size_bytes,
            warnings=[*done.warnings, *made.warnings],
            finished={**asdict(made.format), "content_type": made.content_type, "seconds": made.step_seconds},
            finish_gpu_seconds=made.seconds * num_gpus,
        )

    def cancel(self) -> None:
        """End the work, if it goes on. `address` may be called again afterwards, for another try."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    def _give_up(self, reason: str) -> None:
        self.warning = _SAID.format(reason.rstrip("."))
        logger.warning("plain video", extra={"job": self._request.job_id, "error": reason})
        self.cancel()


class _Call:
    """One call of the finisher, followed by a task of its own.

    Attributes:
        address: where it takes frames; None before it has said.
        share: share of the work that is done.
        finished: its result.
        failure: reason why there will be no result.
        lost: whether that is the loss of a process.
    """

    def __init__(self, finisher: Any, request: FinishRequest) -> None:
        self.address: FrameAddress | None = None
        self.share = 0.0
        self.finished: Finished | None = None
        self.failure: str | None = None
        self.lost = False
        self._changed = asyncio.Event()
        self._stream: Any = None
        self._task = asyncio.create_task(self._run(finisher, request), name=f"finish-{request.job_id}")

    async def listens(self, timeout_s: float) -> bool:
        """Wait until it says where it takes frames; return False if it fails before, or does not say in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(timeout_s, 0)):
                while self.address is None and self.failure is None:
                    await self._changed.wait()
                    self._changed.clear()
        return self.address is not None and self.failure is None

    async def changes(self, timeout_s: float) -> bool:
        """Wait for news, or for the end; return False if there are none in time."""
        if self.failure is None and self.finished is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            changed = self._changed.is_set()
            self._changed.clear()
            return changed
        return True

    def cancel(self) -> None:
        """End the call, wherever it is."""
        self._task.cancel()
        if self._stream is not None:
            with suppress(RayServeException):
                self._stream.cancel()

    async def _run(self, finisher: Any, request: FinishRequest) -> None:
        try:
            self._stream = finisher.finish.remote(request, this_process())
            async for event in self._stream:
                if isinstance(event, Listening):
                    self.address = event.address
                elif isinstance(event, FinishProgress):
                    if event.share == self.share:
                        continue
                    self.share = event.share
                elif isinstance(event, Finished):
                    self.finished = event
                self._changed.set()
            if self.finished is None:
                self.failure = "the finisher's stream ended without a video"
        except asyncio.CancelledError:
            self.failure, self.lost = self.failure or "the finisher was lost with this video in it", True
            raise
        except Exception as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            self.lost = isinstance(cause, RayActorError | RayServeException)
            if self.lost:
                self.failure = "the finisher was lost with this video in it"
            else:
                self.failure = str(cause) if isinstance(cause, FinishFailed) else one_line(cause)
        finally:
            self._changed.set()


def _pixels(format: VideoFormat) -> int:
    return format.width * format.height * format.num_frames
