"""Time of a video's files beyond its decoding: the mp4 by threads of its encoder, thumbnail and spritesheet.

    python -m benchmarks.serving.files [--sizes 832x480 1280x720] [--decode-s 1.5 3.5] [--threads 8 16]

Frames are noise, which costs an encoder most, and come evenly over the seconds that a decode takes. A file's `rest` is
what is left to do when the last of them has come.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks.machine import describe
from serve_app.stages.video_files import SPRITES
from serve_app.wan import video

_FPS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x720"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--decode-s", nargs="+", type=float, default=[1.5, 3.5], help="of each size")
    parser.add_argument("--threads", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if len(options.decode_s) != len(options.sizes):
        parser.error(f"--decode-s has {len(options.decode_s)} values, expected {len(options.sizes)}, one for each size")
    print(f"\n{describe()}\n\n| size | what | threads | s | rest s | bytes |\n|---|---|---|---|---|---|", flush=True)
    for size, decode_s in zip(options.sizes, options.decode_s, strict=True):
        width, height = map(int, size.split("x"))
        frames = np.random.default_rng(0).integers(0, 256, (options.frames, height, width, 3), dtype=np.uint8)
        seconds = _median(lambda: (video.thumbnail(frames), video.spritesheet(frames, *SPRITES)), options.repeats)  # noqa: B023
        print(f"| {size} | thumbnail and spritesheet | | {seconds:.3f} | {seconds:.3f} | |", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            for threads in options.threads:
                with patch.object(video, "_THREADS", threads):
                    seconds = _median(lambda: _write(frames, path, decode_s), options.repeats)  # noqa: B023
                print(
                    f"| {size} | mp4 | {threads} | {seconds:.3f} | {seconds - decode_s:.3f} | {path.stat().st_size} |",
                    flush=True,
                )


def _median(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _write(frames: np.ndarray, path: Path, decode_s: float) -> None:
    began = time.perf_counter()

    def wait(index: int) -> None:
        time.sleep(max(0.0, began + decode_s * (index + 1) / len(frames) - time.perf_counter()))

    video.write_mp4(frames, path, _FPS, {}, wait)


if __name__ == "__main__":
    main()
