"""Interpolation against left-out frames: PSNR of ours, of a linear blend and of FFmpeg's `minterpolate`.

    python -m benchmarks.finish.interpolation [--clips 6] [--kinds left …] [--decoded] [--pictures FOLDER]

Every other frame of rendered clips (256x256, 65 frames) is left out and made again. A clip's PSNR is that of the mean
squared error over all its frames that every method made: `minterpolate` leaves out one at the end. That works in YUV,
whose rounding alone costs it all above 48 dB or so; the columns `YUV` compare frames that all went through the same
conversion. It runs in its default and in its most careful setting. `--decoded` does the same
with clips of the tiny model. `--pictures` writes one picture a kind: the frame left out, a blend, minterpolate, ours.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.finish.clips import KINDS, PROMPTS, decoded, rendered
from benchmarks.machine import describe
from serve_app.finish.interpolate import interpolate

FRAMES, SIZE = 65, 256
CAREFUL = ":mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1"
Method = Callable[[np.ndarray], list[np.ndarray]]
"""Makes the frames between those of `[frames, height, width, 3]`."""


def blend(frames: np.ndarray) -> list[np.ndarray]:
    return [cv2.addWeighted(first, 0.5, second, 0.5, 0) for first, second in pairwise(frames)]


def ours(frames: np.ndarray) -> list[np.ndarray]:
    with ThreadPoolExecutor(1) as pool:
        return list(interpolate(iter(frames), 8, 16, pool, 2))[1::2]


def _ffmpeg(frames: np.ndarray, filters: str) -> list[np.ndarray]:
    height, width = frames.shape[1:3]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command = ["ffmpeg", "-v", "error", "-threads", "1", *raw, "-r", "8", "-i", "-", "-vf", filters, *raw, "-"]
    done = subprocess.run(command, input=frames.tobytes(), stdout=subprocess.PIPE, check=True)
    return list(np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3))


def minterpolate(options: str = "") -> Method:
    return lambda frames: _ffmpeg(frames, f"format=yuv444p,minterpolate=fps=16{options}")[1::2]


METHODS: dict[str, Method] = {
    "ours": ours,
    "blend": blend,
    "minterpolate": minterpolate(),
    "careful": minterpolate(CAREFUL),
}
COLUMNS = (*METHODS, "ours, YUV", "minterpolate, YUV", "careful, YUV")
"""Columns of the table. In the last ones all frames, those left out too, went through the conversion to YUV."""


def psnr(made: list[np.ndarray], truth: list[np.ndarray]) -> float:
    errors = [np.square(one.astype(np.float32) - other).mean() for one, other in zip(made, truth, strict=True)]
    return float(10 * np.log10(255**2 / max(np.mean(errors), 1e-3)))


def measure(clips: list[np.ndarray]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the PSNR of each clip, and the seconds that a frame took, by method."""
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    seconds = dict.fromkeys(METHODS, 0.0)
    count = 0
    for clip in clips:
        made = {}
        for name, method in METHODS.items():
            began = time.perf_counter()
            made[name] = method(clip[::2])
            seconds[name] += time.perf_counter() - began
        common = min(len(one) for one in made.values())
        count += len(clip) // 2
        truth = list(clip[1::2][:common])
        in_yuv = _ffmpeg(np.stack(truth), "format=yuv444p")
        for name, frames in made.items():
            found[name].append(psnr(frames[:common], truth))
            if name == "ours":  # the others have been through it
                frames = _ffmpeg(np.stack(frames), "format=yuv444p")
            if name != "blend":
                found[f"{name}, YUV"].append(psnr(frames[:common], in_yuv))
    return found, {name: spent / count for name, spent in seconds.items()}


def row(name: str, values: dict[str, float], worst: str) -> str:
    best = max(values["minterpolate"], values["careful"])
    best_yuv = max(values["minterpolate, YUV"], values["careful, YUV"])
    cells = [f"{values[column]:.1f}" for column in COLUMNS]
    gains = " | ".join(
        f"{gain:+.1f}"
        for gain in (values["ours"] - values["blend"], values["ours"] - best, values["ours, YUV"] - best_yuv)
    )
    return f"| {name} | {' | '.join(cells)} | {gains} | {worst} |"


def table(groups: dict[str, list[np.ndarray]]) -> None:
    print(f"| clips | {' | '.join(COLUMNS)} | ours - blend | ours - better minterpolate | the same, YUV | worst clip |")
    print("|" + "---|" * (len(COLUMNS) + 5), flush=True)
    means = []
    for name, clips in groups.items():
        found, seconds = measure(clips)
        means.append({column: float(np.mean(values)) for column, values in found.items()})
        worst = int(np.argmin(found["ours"]))
        print(row(name, means[-1], " / ".join(f"{found[column][worst]:.1f}" for column in COLUMNS)), flush=True)
    print(row("mean", {column: float(np.mean([mean[column] for mean in means])) for column in COLUMNS}, ""))
    print("\nms a frame, of the last kind: " + ", ".join(f"{one} {1e3 * spent:.0f}" for one, spent in seconds.items()))


def picture(clip: np.ndarray, path: Path, enlarge: int) -> None:
    """Write the place of a clip's largest change: the frame left out, then each method's, below them what differs."""
    place = int(np.argmax([np.square(a.astype(int) - b).mean() for a, b in zip(clip[:-2:2], clip[2::2], strict=True)]))
    place = min(place, len(clip) // 2 - 5)
    truth = clip[2 * place + 1]
    changed = cv2.absdiff(clip[2 * place], clip[2 * place + 2]).max(axis=2) > 20
    rows, columns = np.nonzero(changed)
    side = min(96, *truth.shape[:2])
    top, left = (
        int(np.clip((some.min() + some.max()) / 2 - side / 2, 0, size - side))
        for some, size in ((rows, truth.shape[0]), (columns, truth.shape[1]))
    )
    shown = {"left out": truth, **{name: METHODS[name](clip[::2])[place] for name in ("blend", "careful", "ours")}}
    titles = {"careful": "minterpolate"}
    sheet = Image.new("RGB", ((side * enlarge + 8) * len(shown) - 8, side * enlarge * 2 + 30), "white")
    for index, (name, frame) in enumerate(shown.items()):
        x = index * (side * enlarge + 8)
        differs = np.clip(255 - 4 * cv2.absdiff(frame, truth).max(axis=2).astype(int), 0, 255).astype(np.uint8)
        for y, one in ((22, frame), (30 + side * enlarge, cv2.cvtColor(differs, cv2.COLOR_GRAY2RGB))):
            part = Image.fromarray(one[top : top + side, left : left + side])
            sheet.paste(part.resize((side * enlarge, side * enlarge), Image.Resampling.NEAREST), (x, y))
        ImageDraw.Draw(sheet).text((x, 2), titles.get(name, name), (0, 0, 0), ImageFont.load_default(16))
    sheet.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--decoded", action="store_true")
    parser.add_argument("--pictures", type=Path)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    ffmpeg = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout.split()[2]
    print(f"\n{describe()}, OpenCV {cv2.__version__}, FFmpeg {ffmpeg}; one thread\n")
    if options.decoded:
        groups = {prompt: [decoded(prompt)] for prompt in PROMPTS}
    else:
        groups = {kind: rendered(kind, options.clips, SIZE, FRAMES) for kind in options.kinds}
    table(groups)
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for name, clips in groups.items():
            words = name.lower().split()
            stem = "-".join(words[1:3]) if options.decoded else "-".join(words)
            prefix = "decoded" if options.decoded else "rendered"
            picture(clips[0], options.pictures / f"{prefix}-{stem}.png", 2)


if __name__ == "__main__":
    main()
