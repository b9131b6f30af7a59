"""Video files: an mp4 with its parameters inside, a thumbnail, a spritesheet.

Knows nothing of models. Needs numpy, PyAV and Pillow only, so that a CPU process without torch can use it.
"""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_X264 = {
    "preset": "medium",
    "crf": "17",  # visually lossless for H.264; a higher number is smaller and worse
    # Off, so that equal frames give equal files: with it, x264's AVX-512 code reads uninitialised memory.
    "x264-params": "mbtree=0",
}
_THREADS = 16
"""Threads of the encoder. With 8, decoding on two GPUs is faster than it (`python -m benchmarks.serving.files`)."""
_BT709 = 1  # code of BT.709 in H.273, the same for matrix, primaries and transfer
_TV_RANGE = 1


def write_mp4(
    frames: np.ndarray,
    path: Path,
    fps: int,
    metadata: dict[str, Any],
    wait: Callable[[int], None] = lambda index: None,
) -> None:
    """Write an mp4 with H.264, yuv420p, and the index at the front, so that browsers start before all of it is loaded.

    The file appears at `path` complete, or not at all.

    Args:
        frames: `[frames, height, width, 3]`, uint8 RGB, even sides.
        path: file to write; one that is there is replaced.
        fps: frames per second.
        metadata: JSON-able; stored as the comment of the file, see `read_metadata`. The file's description says that
            its `model` made it.
        wait: called with the index of each frame before it is read, to wait until it is there, and with the last index
            again and again while the encoder finishes. An error that it raises ends the writing.

    Raises:
        ValueError: frames of another shape or type.
    """
    _check_frames(frames)
    path = Path(path)
    handle, name = tempfile.mkstemp(suffix=".mp4", prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        _encode(frames, name, fps, metadata, wait)
        temporary.chmod(0o644)  # mkstemp's 0600 would keep a web server's user out
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check_frames(frames: np.ndarray) -> None:
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.shape[0]:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 [frames, height, width, 3]")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames are {width}x{height}, expected even sides: yuv420p halves the colour resolution")


def _encode(frames: np.ndarray, file: str, fps: int, metadata: dict[str, Any], wait: Callable[[int], None]) -> None:
    import av  # here, because loading its libraries takes a moment and only the decoder stage writes videos
    from av.video.reformatter import Colorspace

    with av.open(file, "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = json.dumps(metadata, ensure_ascii=False, sort_keys=True)
        if model := metadata.get("model"):
            container.metadata["description"] = f"AI-generated video, made by {model}."
        stream = container.add_stream("libx264", rate=fps, options=_X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        # By default x264 cuts each frame into as many slices as there are cores, and files differ by machine.
        context.thread_type, context.thread_count = "FRAME", _THREADS
        # Without these, players guess the matrix from the size, and colours differ between preview and full size.
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _TV_RANGE
        for index, array in enumerate(frames):
            wait(index)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        # Packet by packet, because finishing takes seconds, and meanwhile the video may not be wanted any more.
        for packet in context.encode_lazy():
            wait(len(frames) - 1)
            packet.stream = stream
            container.mux(packet)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the `metadata` that `write_mp4` was given; empty for a file of other origin."""
    import av

    with av.open(str(path)) as container:
        try:
            content = json.loads(container.metadata.get("comment", ""))
        except ValueError:
            return {}
    return content if isinstance(content, dict) else {}


def thumbnail(frames: np.ndarray) -> bytes:
    """Return the middle frame of `[frames, height, width, 3]` as JPEG."""
    return _jpeg(Image.fromarray(frames[len(frames) // 2]))


def spritesheet(frames: np.ndarray, columns: int = 5, most: int = 25, tile: int = 320) -> bytes:
    """Return a grid of evenly spaced frames as JPEG, left to right and top to bottom.

    Args:
        frames: `[frames, height, width, 3]`, uint8 RGB.
        columns: tiles in a row, fewer when there are fewer frames.
        most: largest number of tiles; the first and the last frame are always among them.
        tile: most pixels of the longer side of a tile.
    """
    count = min(most, len(frames))
    picks = np.linspace(0, len(frames) - 1, count).round().astype(int)
    height, width = frames.shape[1:3]
    scale = min(1.0, tile / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    columns = min(columns, count)
    sheet = Image.new("RGB", (columns * size[0], math.ceil(count / columns) * size[1]))
    for place, pick in enumerate(picks):
        image = Image.fromarray(frames[pick]).resize(size, Image.Resampling.LANCZOS)
        sheet.paste(image, (place % columns * size[0], place // columns * size[1]))
    return _jpeg(sheet)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
