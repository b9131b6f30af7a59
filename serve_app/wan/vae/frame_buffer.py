"""The frame buffer: frames of a video whose decode is under way, for readers of the first ones."""

from __future__ import annotations

import threading

import numpy as np

from serve_app.errors import ServeAppError


class Abandoned(ServeAppError):
    """Error of a frame buffer whose video nobody wants any more."""

    def __init__(self) -> None:
        super().__init__("nobody wants this video any more")


class PixelsNotFinite(ServeAppError):
    """Some of a video's pixels are NaN or infinite. As bytes they would be black, and nobody would notice."""


class FrameBuffer:
    """The frames of one video. Created before the decode, which fills it from its own threads.

    A reader that is ahead waits. Frames do not change after they were read, with one exception: a tile that did not fit
    into memory is decoded again in parts, and its pixels may then differ in their last bits.

    Either side may end it with `fail`: the decode if it cannot make the frames, or the reader if nobody wants them any
    more. The other side gets the error: a reader at its next frame, a decode before its next chunk.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._frames: np.ndarray | None = None
        self._whole = 0
        self._error: BaseException | None = None

    @property
    def error(self) -> BaseException | None:
        """Reason why no more frames will come; None as long as they may."""
        return self._error

    def begin(self, frames: np.ndarray) -> None:
        """Set the array that the frames will be in, `[frames, height, width, 3]`."""
        with self._changed:
            self._frames = frames
            self._changed.notify_all()

    def advance(self, whole: int) -> None:
        """Announce that the first `whole` frames are there."""
        with self._changed:
            self._whole = max(self._whole, whole)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End it: no more frames will come. The first error stands."""
        with self._changed:
            if self._error is None:
                self._error = error
                self._changed.notify_all()

    def frames(self) -> np.ndarray:
        """Wait for the decode to begin and return the array of all frames, most of which may not be there yet.

        Raises:
            BaseException: the error that `fail` was given.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._frames is not None or self._error is not None)
            if self._frames is None:
                assert self._error is not None
                raise self._error
            return self._frames

    def wait(self, index: int) -> None:
        """Wait until frame `index` is there.

        Raises:
            BaseException: the error that `fail` was given.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._whole > index or self._error is not None)
            if self._error is not None:
                raise self._error
