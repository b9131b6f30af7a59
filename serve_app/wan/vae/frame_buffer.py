"""Frames of a video whose decode is under way, for who reads them while later ones are made; and how it ends early."""

from __future__ import annotations

import threading

import numpy as np

from serve_app.errors import ServeAppError


class Abandoned(ServeAppError):
    """Nobody wants the video any more."""

    def __init__(self) -> None:
        super().__init__("nobody wants this video any more")


class PixelsNotFinite(ServeAppError):
    """Some of a video's pixels are NaN or infinite. As bytes they would be black, and nobody would know."""


class FrameBuffer:
    """The frames of one video. Made before the decode, which fills it in from its own threads.

    A reader that is ahead waits. What it has read does not change any more, unless a tile did not fit into memory and
    is made anew in parts, whose pixels may differ in their last bits.

    Either side may end it with `fail`: the decode because the frames cannot be had, or whoever asked because nobody
    wants them any more. The other side then hears of it: a reader at its next frame, a decode before its next chunk.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._frames: np.ndarray | None = None
        self._whole = 0
        self._error: BaseException | None = None

    @property
    def error(self) -> BaseException | None:
        """Why no more frames will come; None as long as they may."""
        return self._error

    def begin(self, frames: np.ndarray) -> None:
        """Say where the frames will be: `[frames, height, width, 3]`."""
        with self._changed:
            self._frames = frames
            self._changed.notify_all()

    def advance(self, whole: int) -> None:
        """Say that the first `whole` frames are there."""
        with self._changed:
            self._whole = max(self._whole, whole)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Say that no more frames will come. The first reason stands."""
        with self._changed:
            if self._error is None:
                self._error = error
                self._changed.notify_all()

    def frames(self) -> np.ndarray:
        """Return all frames, as soon as it is known where they will be.

        Raises:
            BaseException: what `fail` was given.
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
            BaseException: what `fail` was given.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._whole > index or self._error is not None)
            if self._error is not None:
                raise self._error
