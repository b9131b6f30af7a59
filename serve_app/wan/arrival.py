"""Frames of a decode that is under way, for who reads them while later ones are made."""

from __future__ import annotations

import threading

import numpy as np


class Arrival:
    """Made before the decode, which fills it in from its own threads.

    A reader that is ahead waits. What it has read does not change any more, unless a tile did not fit into memory and
    is made anew in parts, whose pixels may differ in their last bits.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._frames: np.ndarray | None = None
        self._whole = 0
        self._error: BaseException | None = None

    def begin(self, frames: np.ndarray) -> None:
        """Where they will be: `[samples, frames, height, width, 3]`."""
        with self._changed:
            self._frames = frames
            self._changed.notify_all()

    def advance(self, whole: int) -> None:
        """The first `whole` frames of each sample are there."""
        with self._changed:
            self._whole = max(self._whole, whole)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """No more will come."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def frames(self) -> np.ndarray:
        """All of them, as soon as it is known where.

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
        """Until frame `index` is there.

        Raises:
            BaseException: what `fail` was given.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._whole > index or self._error is not None)
            if self._error is not None:
                raise self._error
