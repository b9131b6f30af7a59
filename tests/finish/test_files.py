"""Previews, stills, XMP and marks."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serve_app.finish.extras import Preview, Stills
from serve_app.finish.label import AI_MADE, read_xmp, xmp
from serve_app.finish.mark import Mark
from serve_app.finish.plan import VideoFormat
from tests.support.films import pan, psnr

METADATA = {"model": "A & B", "revision": "r1", "prompt": "红色 <i>“x”</i> \x00 & y"}


def test_an_xmp_packet_comes_back() -> None:
    fields = read_xmp(b"before" + xmp(METADATA, "1.2").encode() + b"after")
    assert fields == {
        "Iptc4xmpExt:DigitalSourceType": AI_MADE,
        "Iptc4xmpExt:AISystemUsed": "A & B, served by serve_app 1.2",
        "Iptc4xmpExt:AISystemVersionUsed": "r1",
        "Iptc4xmpExt:AIPromptInformation": "红色 <i>“x”</i>  & y",
        "xmp:CreatorTool": "serve_app 1.2",
    }
    assert read_xmp(b"nothing") == {}


@pytest.mark.parametrize(("frames", "fps", "shown", "duration"), [(33, 32, 11, 94), (5, 8, 5, 125), (1, 16, 1, 125)])
def test_a_preview_has_the_speed_of_the_video(tmp_path: Path, frames: int, fps: int, shown: int, duration: int) -> None:
    preview = Preview("webp", VideoFormat(1280, 720, fps, frames), xmp(METADATA, "1"), "")
    for index in range(frames):
        preview.add(index, np.full((720, 1280, 3), index * 5, np.uint8))
    preview.save(tmp_path / "a.webp")
    with Image.open(tmp_path / "a.webp") as image:
        assert image.size == (480, 270)
        assert getattr(image, "n_frames", 1) == shown
        if shown > 1:
            image.seek(1)
            image.load()
            assert image.info["duration"] == duration
    assert read_xmp((tmp_path / "a.webp").read_bytes())["Iptc4xmpExt:DigitalSourceType"] == AI_MADE


def test_a_preview_of_a_long_video_is_bounded() -> None:
    preview = Preview("gif", VideoFormat(8, 8, 60, 6000), "", "")
    for index in range(6000):
        preview.add(index, np.zeros((8, 8, 3), np.uint8))
    assert len(preview._frames) <= 96


def test_a_gif_says_who_made_it(tmp_path: Path) -> None:
    preview = Preview("gif", VideoFormat(64, 48, 12, 3), "", "AI-generated video")
    for index, frame in enumerate(pan(3, height=48, width=64)):
        preview.add(index, frame)
    preview.save(tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["comment"] == b"AI-generated video" and getattr(image, "n_frames", 0) == 3
        assert image.info["loop"] == 0


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_stills_are_the_frames(tmp_path: Path, kind: str) -> None:
    frames = pan(3, height=47, width=63)
    stills = Stills(tmp_path / "a.zip", kind, xmp(METADATA, "1"))  # type: ignore[arg-type]
    for index, frame in enumerate(frames):
        stills.add(index, frame)
    stills.close()
    ending = "jpg" if kind == "jpeg" else kind
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        assert file.namelist() == [f"frame-{index:05d}.{ending}" for index in range(3)]
        for name, frame in zip(file.namelist(), frames, strict=True):
            content = file.read(name)
            shown = np.asarray(Image.open(io.BytesIO(content)))
            assert np.array_equal(shown, frame) if kind == "png" else psnr(shown, frame) > 30
            assert read_xmp(content)["Iptc4xmpExt:DigitalSourceType"] == AI_MADE


def test_a_mark_is_in_the_lower_right_and_leaves_the_rest() -> None:
    frame = np.full((180, 320, 3), 90, np.uint8)
    marked = Mark("AI-made", 320, 180, None).draw(frame)
    rows, columns = np.nonzero((marked != frame).any(axis=2))
    assert rows.min() > 150 and columns.min() > 240 and columns.max() < 320
    assert marked.max() > 200 and marked.min() < 60  # light letters, dark edges
    assert (frame == 90).all()


@pytest.mark.parametrize(
    ("text", "message"), [("AI生成", "'mark' has character '.', expected characters of the font"), ("A" * 40, "large")]
)
def test_a_mark_that_cannot_be_drawn(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mark(text, 64, 48, None)
