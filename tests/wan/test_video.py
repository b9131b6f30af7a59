from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from serve_app.wan.video import read_metadata, spritesheet, thumbnail, write_mp4

METADATA = {"prompt": "红色的圆形 “left” \n → \\", "seed": 2**40, "guidance_scale": 4.5, "nested": {"a": [1, None]}}
COLOURS = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (250, 200, 20)]


def solid(*colours: tuple[int, int, int], height: int = 48, width: int = 64) -> np.ndarray:
    return np.stack([np.full((height, width, 3), colour, np.uint8) for colour in colours])


def noise(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (frames, height // 8, width // 8, 3), np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def boxes(path: Path) -> list[str]:
    """The types of an mp4's top-level boxes, in order."""
    data, position, found = path.read_bytes(), 0, []
    while position < len(data):
        found.append(data[position + 4 : position + 8].decode())
        position += int.from_bytes(data[position : position + 4], "big")
    return found


def test_equal_frames_give_equal_streams_on_any_number_of_cores_whatever_was_in_memory_before(tmp_path: Path) -> None:
    """Have glibc fill fresh and freed memory with a byte of ours, so that what reads it shows."""
    moving = noise(9, 256, 128) // 2 + np.arange(9, dtype=np.uint8)[:, None, None, None] * 8
    np.save(tmp_path / "frames.npy", moving)
    code = (
        "import os, sys, numpy; from pathlib import Path; from serve_app.wan.video import write_mp4;"
        "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[3])]);"
        "write_mp4(numpy.load(sys.argv[1]), Path(sys.argv[2]), 16, {})"
    )
    streams = []
    for fill, cores in (("1", "1000"), ("100", "1000"), ("200", "1")):
        path = tmp_path / f"{fill}.mp4"
        environment = {**os.environ, "MALLOC_PERTURB_": fill, "MALLOC_MMAP_THRESHOLD_": str(1 << 28)}
        command = [sys.executable, "-c", code, tmp_path / "frames.npy", path, cores]
        subprocess.run(command, env=environment, check=True)
        with av.open(str(path)) as container:
            streams.append(b"".join(bytes(packet) for packet in container.demux(video=0)))
    assert streams[0] == streams[1] == streams[2]


@pytest.mark.parametrize(("frames", "fps"), [(9, 16), (1, 16), (33, 24)])
def test_mp4(tmp_path: Path, frames: int, fps: int) -> None:
    path = tmp_path / "video.mp4"
    write_mp4(noise(frames), path, fps, METADATA)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.width, context.height) == (64, 48)
        assert (context.colorspace, context.color_range) == (1, 1)
        assert stream.average_rate == fps
        assert stream.frames == frames
        assert float(stream.duration * stream.time_base) == pytest.approx(frames / fps, abs=0.01)
        assert sum(1 for _ in container.decode(video=0)) == frames
    order = boxes(path)
    assert order.index("moov") < order.index("mdat")
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_metadata_comes_back(tmp_path: Path) -> None:
    write_mp4(noise(5), tmp_path / "a.mp4", 16, METADATA)
    assert read_metadata(tmp_path / "a.mp4") == METADATA


@pytest.mark.parametrize("comment", [None, "made by hand", "[1]"])
def test_metadata_of_other_files(tmp_path: Path, comment: str | None) -> None:
    path = tmp_path / "other.mp4"
    with av.open(str(path), "w") as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(1)[0], format="rgb24")))
        container.mux(stream.encode())
    assert read_metadata(path) == {}


def test_colours_and_detail_survive(tmp_path: Path) -> None:
    for name, frames, most in (("solid", solid(*COLOURS), 4.0), ("noise", noise(8), 12.0)):
        write_mp4(frames, tmp_path / f"{name}.mp4", 16, {})
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        error = np.abs(decoded.astype(int) - frames).mean(axis=(1, 2, 3))
        assert error.max() <= most, (name, error)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 48, 64, 3), np.float32), "frames are float32"),
        (np.zeros((48, 64, 3), np.uint8), r"expected uint8 \[frames, height, width, 3\]"),
        (np.zeros((0, 48, 64, 3), np.uint8), r"expected uint8 \[frames, height, width, 3\]"),
        (np.zeros((2, 47, 64, 3), np.uint8), "frames are 64x47, expected even sides"),
    ],
)
def test_wrong_frames_leave_nothing(tmp_path: Path, frames: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_mp4(frames, tmp_path / "video.mp4", 16, {})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_mp4(noise(2), path, 16, {"not": {"json"}})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_thumbnail_is_the_middle_frame() -> None:
    image = Image.open(io.BytesIO(thumbnail(solid((255, 0, 0), (0, 0, 255), (0, 255, 0)))))
    assert (image.format, image.size) == ("JPEG", (64, 48))
    red, green, blue = image.getpixel((32, 24))
    assert blue > 240 and red < 15 and green < 15


def test_spritesheet_is_a_grid_of_all_parts() -> None:
    shades = [(value, value, value) for value in range(0, 250, 10)]
    sheet = Image.open(io.BytesIO(spritesheet(solid(*shades), columns=3, most=7)))
    assert (sheet.format, sheet.size) == ("JPEG", (3 * 64, 3 * 48))
    tiles = [sheet.getpixel((column * 64 + 32, row * 48 + 24))[0] for row in range(3) for column in range(3)]
    assert tiles[:7] == pytest.approx([0, 40, 80, 120, 160, 200, 240], abs=4)
    assert tiles[7:] == pytest.approx([0, 0], abs=2)


def test_spritesheet_of_few_or_large_frames() -> None:
    assert Image.open(io.BytesIO(spritesheet(solid(COLOURS[0]), columns=5))).size == (64, 48)
    large = spritesheet(solid(*COLOURS[:3], height=720, width=1280), columns=5, tile=320)
    assert Image.open(io.BytesIO(large)).size == (3 * 320, 180)


def test_no_torch() -> None:
    code = "import sys, serve_app.wan.video; assert 'av' not in sys.modules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
