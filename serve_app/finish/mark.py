"""The visible mark: a short text in the lower right corner of every frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_HEIGHT = 0.04
"""Height of the letters, of the shorter side of the frame."""
_SMALLEST_PX = 9
_OPACITY = 200


class Mark:
    """A text that is drawn into frames, white with a dark edge, so that it can be read on any ground.

    Args:
        text: the text.
        width: of the frames.
        height: of the frames.
        font: TrueType file; None is Pillow's own font, which has Latin letters only.

    Raises:
        ValueError: the font lacks a character, or the text does not fit into the frame.
    """

    def __init__(self, text: str, width: int, height: int, font: Path | None) -> None:
        size = max(_SMALLEST_PX, round(min(width, height) * _HEIGHT))
        face = ImageFont.truetype(str(font), size) if font else ImageFont.load_default(size)
        for letter in sorted(set(text) - {" "}):
            if bytes(face.getmask(letter)) == bytes(face.getmask("\uffff")):
                raise ValueError(f"'mark' has character '{letter}', expected characters of the font (option `font`)")
        edge = max(1, size // 10)
        left, top, right, bottom = (int(side) for side in face.getbbox(text, stroke_width=edge))
        across, down, margin = right - left, bottom - top, size // 2
        if across + margin > width or down + margin > height:
            raise ValueError(f"'mark' is {across}x{down} pixels large, expected less than the frame's {width}x{height}")
        image = Image.new("RGBA", (across, down))
        ImageDraw.Draw(image).text(
            (-left, -top), text, (255, 255, 255, _OPACITY), face, stroke_width=edge, stroke_fill=(0, 0, 0, _OPACITY)
        )
        pixels = np.asarray(image).astype(np.float32)
        self._share = pixels[..., 3:] / 255
        self._light = pixels[..., :3] * self._share
        self._place = np.s_[height - margin - down : height - margin, width - margin - across : width - margin]

    def draw(self, frame: np.ndarray) -> np.ndarray:
        """Return a copy of a frame `[height, width, 3]`, uint8 RGB, with the mark."""
        frame = frame.copy()
        frame[self._place] = (frame[self._place] * (1 - self._share) + self._light).round()
        return frame
