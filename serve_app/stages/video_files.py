"""The files of one video: written while its frames are decoded, then stored."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from serve_app.errors import one_line
from serve_app.logs import get_logger
from serve_app.storage import Storage, download_name
from serve_app.wan.vae.frame_buffer import Abandoned, FrameBuffer

logger = get_logger(__name__)

SPRITES = (4, 16)
"""Columns and tiles of a spritesheet."""
_NAMES = ("thumbnail.jpg", "spritesheet.jpg", "video.mp4")


@dataclass(frozen=True)
class StoredVideo:
    """A video whose files are stored.

    Attributes:
        outputs: storage keys of `video`, `thumbnail` and `spritesheet`.
        size_bytes: size of the mp4.
        seconds: how long storing took after decoding.
    """

    outputs: dict[str, str]
    size_bytes: int
    seconds: float


class VideoFiles:
    """Writes and stores the files of one video.

    Args:
        storage: where they go.
        prefix: their folder there.
        job_id: the job, for download names and logs.
        fps: frames per second.
        metadata: what the mp4 says of itself.
        again: whether an earlier try may have left files under `prefix`; they are removed.
    """

    def __init__(
        self, storage: Storage, prefix: str, job_id: str, fps: int, metadata: dict[str, Any], again: bool
    ) -> None:
        self._storage = storage
        self._prefix = prefix
        self._job_id = job_id
        self._fps = fps
        self._metadata = metadata
        self._again = again
        self._outputs: dict[str, str] = {}

    async def store(self, frame_buffer: FrameBuffer, decoded: asyncio.Future[float]) -> StoredVideo:
        """Write the files while frames come, and store them. If cancelled after the decode, leave none.

        Args:
            frame_buffer: the frames.
            decoded: done when all frames are there; the moment, on the monotonic clock.
        """
        from serve_app.wan.video import spritesheet, thumbnail, write_mp4

        def write(path: Path) -> None:
            write_mp4(frame_buffer.frames(), path, self._fps, self._metadata, frame_buffer.wait)

        with TemporaryDirectory(prefix="wan-serve-") as folder:
            path = Path(folder) / "video.mp4"
            writing = asyncio.create_task(asyncio.to_thread(write, path))
            try:
                began = await decoded
                if self._again:  # these alone: a finisher stores its own files below the same folder
                    for name in _NAMES:
                        await self._storage.delete(f"{self._prefix}/{name}")
                frames = frame_buffer.frames()  # the encoder is still at work on the last of them
                small = await asyncio.to_thread(lambda: (thumbnail(frames), spritesheet(frames, *SPRITES)))
                await self._put("thumbnail.jpg", small[0])
                await self._put("spritesheet.jpg", small[1])
                await asyncio.shield(writing)
                # The video comes last, so that the rest is there once the video is.
                await self._put("video.mp4", path)
            except BaseException as error:
                frame_buffer.fail(Abandoned())  # the encoder need not go on
                if isinstance(error, asyncio.CancelledError) and decoded.done() and not decoded.cancelled():
                    await self._remove()
                raise
            finally:
                # The thread cannot be stopped at any moment, and needs its folder until it ends.
                await asyncio.gather(writing, return_exceptions=True)
            return StoredVideo(self._outputs, path.stat().st_size, time.monotonic() - began)

    async def _put(self, name: str, content: bytes | Path) -> None:
        key = f"{self._prefix}/{name}"
        putting = asyncio.ensure_future(self._storage.put(key, content, download_name(self._job_id, key)))
        try:
            await asyncio.shield(putting)
        except asyncio.CancelledError:
            # It goes on in its thread, and only a file that is there can be removed.
            await asyncio.gather(putting, return_exceptions=True)
            raise
        self._outputs[name.partition(".")[0]] = key

    async def _remove(self) -> None:
        try:
            await self._storage.delete_prefix(self._prefix)
        except OSError as error:  # the dispatcher has them removed later as well
            logger.warning("files not removed yet", extra={"job": self._job_id, "error": one_line(error)})


def warm_up(frames: np.ndarray, fps: int) -> None:
    """Make all files of a video once, and store none, so that no request pays for first-time work."""
    from serve_app.wan.video import spritesheet, thumbnail, write_mp4

    with TemporaryDirectory(prefix="wan-serve-") as folder:
        write_mp4(frames, Path(folder) / "video.mp4", fps, {})
    thumbnail(frames)
    spritesheet(frames, *SPRITES)
