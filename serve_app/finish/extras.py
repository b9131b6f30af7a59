"""Further files of a finished video: an animated preview and a zip of still frames."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from serve_app.finish.plan import VideoFormat

_PREVIEW_SIDE = 480
_PREVIEW_FPS = 12
_PREVIEW_FRAMES = 96
"""Most frames of a preview: they are held in memory, whatever the length of the video."""


class Preview:
    """An animated preview, small and of few frames, at the speed of the video.

    Args:
        kind: `webp` or `gif`.
        video: the video whose frames come.
        xmp: XMP packet for the file; empty is none. A gif cannot hold it.
        comment: text of a gif.
    """

    def __init__(self, kind: Literal["webp", "gif"], video: VideoFormat, xmp: str, comment: str) -> None:
        self.kind = kind
        self._every = math.ceil(max(video.fps / _PREVIEW_FPS, video.num_frames / _PREVIEW_FRAMES))
        self._duration = round(1000 * self._every / video.fps)
        scale = min(1.0, _PREVIEW_SIDE / max(video.width, video.height))
        self._size = max(1, round(video.width * scale)), max(1, round(video.height * scale))
        self._xmp, self._comment = xmp, comment
        self._frames: list[Image.Image] = []

    def add(self, index: int, frame: np.ndarray) -> None:
        """Take a frame `[height, width, 3]`, uint8 RGB, if it is one of the preview's."""
        if index % self._every == 0:
            self._frames.append(Image.fromarray(cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)))

    def save(self, path: Path) -> None:
        """Write the file."""
        first, *rest = self._frames
        more: dict[str, Any] = {"comment": self._comment}
        if self.kind == "webp":
            more = {"quality": 80, "method": 2, "xmp": self._xmp.encode()}
        first.save(path, self.kind.upper(), save_all=True, append_images=rest, duration=self._duration, loop=0, **more)


class Stills:
    """All frames as pictures in a zip file, written as they come.

    Args:
        path: the zip file.
        kind: `png` or `jpeg`.
        xmp: XMP packet for each picture; empty is none.
    """

    def __init__(self, path: Path, kind: Literal["png", "jpeg"], xmp: str) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)  # pictures do not get smaller
        self._kind, self._xmp = kind, xmp

    def add(self, index: int, frame: np.ndarray) -> None:
        """Add frame number `index`, `[height, width, 3]`, uint8 RGB."""
        picture = io.BytesIO()
        image = Image.fromarray(frame)
        if self._kind == "png":
            info = PngInfo()
            if self._xmp:
                info.add_itxt("XML:com.adobe.xmp", self._xmp)
            image.save(picture, "PNG", compress_level=3, pnginfo=info)
        else:
            image.save(picture, "JPEG", quality=95, **({"xmp": self._xmp.encode()} if self._xmp else {}))
        self._zip.writestr(f"frame-{index:05d}.{'png' if self._kind == 'png' else 'jpg'}", picture.getvalue())

    def close(self) -> None:
        """Write the end of the zip file."""
        self._zip.close()
