"""The step `encode`: a video file of frames that come one by one, with the tags that players want."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from serve_app.finish.plan import Encode, VideoFormat

CONTENT_TYPES = {"mp4": "video/mp4", "webm": "video/webm"}
_BT709 = 1  # code of BT.709 in H.273, the same for matrix, primaries and transfer
_TV_RANGE = 1
_ENCODERS = {"h264": "libx264", "h265": "libx265", "av1": "libsvtav1"}
_CRF = {"h264": (17, 0.4), "h265": (20, 0.39), "av1": (24, 0.48)}
"""Constant rate factor at quality 80, and how much one point of quality takes from it."""


def crf(codec: str, quality: int) -> int:
    """Return an encoder's constant rate factor for a quality from 1 to 100."""
    middle, point = _CRF[codec]
    return round(middle + (80 - quality) * point)


def write_video(
    frames: Iterable[np.ndarray],
    video: VideoFormat,
    plan: Encode,
    path: Path,
    tags: Mapping[str, str],
    threads: int,
    busy: Callable[[], AbstractContextManager[None]],
    check: Callable[[int], None],
) -> VideoFormat:
    """Write a video file, and return its size and length.

    An odd side gets one more row or column where the pixel format halves the colour resolution.

    Args:
        frames: `[height, width, 3]`, uint8 RGB.
        video: size and rate of the frames. Their number is counted.
        plan: codec, container, quality and pixel format.
        path: file to write.
        tags: fields of the container's metadata.
        threads: most threads of the encoder.
        busy: context in which the encoder works, to measure its time.
        check: called with the number of frames so far, also while the encoder finishes. An error that it raises ends
            the writing.
    """
    import av  # here, because loading its libraries takes a moment
    from av.video.reformatter import Colorspace

    halved = plan.pixel_format.startswith("yuv420")
    width, height = ((side + side % 2 if halved else side) for side in (video.width, video.height))
    # The index at the front lets players start before all of it is loaded.
    options = {"movflags": "+faststart"} if plan.container == "mp4" else {}
    count = 0
    with av.open(str(path), "w", format=plan.container, options=options) as container:
        container.metadata.update(tags)
        stream: Any = container.add_stream(_ENCODERS[plan.codec], rate=video.fps, options=_options(plan, threads))
        stream.width, stream.height, stream.pix_fmt = width, height, plan.pixel_format
        context = stream.codec_context
        if plan.codec == "h264":
            # As in the plain file: the same frames give the same file on any number of cores.
            context.thread_type, context.thread_count = "FRAME", 16
        if plan.codec == "h265" and plan.container == "mp4":
            context.codec_tag = "hvc1"  # QuickTime and phones do not open `hev1`, FFmpeg's own choice
        # Without these, players guess the matrix from the size, and colours differ between preview and full size.
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _TV_RANGE
        for array in frames:
            check(count)
            with busy():
                frame = av.VideoFrame.from_ndarray(_padded(array, width, height), format="rgb24")
                frame = frame.reformat(format=plan.pixel_format, dst_colorspace=Colorspace.ITU709)
                frame.pts = count
                container.mux(stream.encode(frame))
            count += 1
        with busy():
            # Packet by packet, because finishing takes seconds, and meanwhile the video may not be wanted any more.
            for packet in context.encode_lazy():
                check(count)
                packet.stream = stream
                container.mux(packet)
    return VideoFormat(width, height, video.fps, count)


def comment(metadata: Mapping[str, Any]) -> str:
    """Return what a file's comment says: JSON with the parameters, as in the plain file."""
    return json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True)


def _options(plan: Encode, threads: int) -> dict[str, str]:
    """Return the options of an encoder."""
    options = {"crf": str(crf(plan.codec, plan.quality))}
    if plan.codec == "h264":
        return {**options, "preset": "medium", "x264-params": "mbtree=0"}
    if plan.codec == "h265":
        return {**options, "preset": "fast", "x265-params": f"log-level=none:pools={threads}:frame-threads=4"}
    os.environ.setdefault("SVT_LOG", "1")  # errors only; it writes to the process's stderr, whatever FFmpeg's level
    return {**options, "preset": "8", "svtav1-params": f"lp={min(threads, 6)}"}


def _padded(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    down, right = height - frame.shape[0], width - frame.shape[1]
    if not (down or right):
        return np.ascontiguousarray(frame)
    return cv2.copyMakeBorder(frame, 0, down, 0, right, cv2.BORDER_REPLICATE)
