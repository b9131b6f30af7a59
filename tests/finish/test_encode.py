from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from serve_app.finish.encode import crf, write_video
from serve_app.finish.plan import Encode, VideoFormat
from tests.support.films import decoded, pan, psnr

TAGS = {"h264": "avc1", "h265": "hvc1", "av1": "av01"}
FRAMES = pan(5, height=48, width=64)


def write(path: Path, frames: list[np.ndarray], fps: int = 32, **fields: Any) -> VideoFormat:
    height, width = frames[0].shape[:2]
    video = VideoFormat(width, height, fps, len(frames))
    plan = Encode.model_validate(fields)
    return write_video(iter(frames), video, plan, path, {"comment": "x"}, 2, nullcontext, lambda count: None)


def boxes(path: Path) -> list[str]:
    data, position, found = path.read_bytes(), 0, []
    while position < len(data):
        found.append(data[position + 4 : position + 8].decode())
        position += int.from_bytes(data[position : position + 4], "big")
    return found


@pytest.mark.parametrize(
    ("codec", "container", "pixel_format"),
    [
        ("h264", "mp4", "yuv420p"),
        ("h264", "mp4", "yuv444p"),
        ("h265", "mp4", "yuv420p"),
        ("h265", "mp4", "yuv420p10le"),
        ("av1", "mp4", "yuv420p"),
        ("av1", "mp4", "yuv420p10le"),
        ("av1", "webm", "yuv420p"),
    ],
)
def test_players_get_the_tags_they_want(tmp_path: Path, codec: str, container: str, pixel_format: str) -> None:
    path = tmp_path / f"video.{container}"
    made = write(path, FRAMES, codec=codec, container=container, pixel_format=pixel_format)
    assert made == VideoFormat(64, 48, 32, 5)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        context = stream.codec_context
        assert (context.width, context.height, context.pix_fmt) == (64, 48, pixel_format)
        # bt709 in matrix, primaries and transfer, limited range
        colours = context.colorspace, context.color_primaries, context.color_trc, context.color_range
        assert [int(colour) for colour in colours] == [1, 1, 1, 1]
        assert stream.average_rate == 32
        if container == "mp4":
            assert context.codec_tag == TAGS[codec]
            assert stream.frames == 5
    if container == "mp4":
        assert boxes(path).index("moov") < boxes(path).index("mdat")
        assert b"colrnclx" in path.read_bytes()  # where QuickTime looks for the colours
    shown = list(decoded(path))
    assert len(shown) == 5
    assert all(psnr(one, truth) > 30 for one, truth in zip(shown, FRAMES, strict=True))


@pytest.mark.parametrize("codec", ["h264", "h265", "av1"])
def test_quality_has_a_price(tmp_path: Path, codec: str) -> None:
    sizes, errors = [], []
    for quality in (20, 80, 100):
        path = tmp_path / f"{quality}.mp4"
        write(path, FRAMES, codec=codec, quality=quality)
        sizes.append(path.stat().st_size)
        errors.append(psnr(next(decoded(path)), FRAMES[0]))
    assert sizes == sorted(sizes) and errors == sorted(errors), (sizes, errors)
    assert crf(codec, 80) in (17, 20, 24) and 0 <= crf(codec, 100) < crf(codec, 1) <= (63 if codec == "av1" else 51)


def test_odd_sides_get_a_line_more(tmp_path: Path) -> None:
    frames = pan(2, height=47, width=65)
    assert write(tmp_path / "a.mp4", frames) == VideoFormat(66, 48, 32, 2)
    first = next(decoded(tmp_path / "a.mp4"))
    assert first.shape == (48, 66, 3) and psnr(first[:47, :65], frames[0]) > 30
    assert write(tmp_path / "b.mp4", frames, pixel_format="yuv444p") == VideoFormat(65, 47, 32, 2)


def test_one_frame(tmp_path: Path) -> None:
    assert write(tmp_path / "a.mp4", FRAMES[:1]).num_frames == 1
    assert len(list(decoded(tmp_path / "a.mp4"))) == 1
