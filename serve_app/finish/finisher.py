"""The finisher: chains the steps of a plan over frames that come one by one, and returns the files."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from serve_app.errors import one_line
from serve_app.finish import manifest
from serve_app.finish.encode import CONTENT_TYPES, comment, write_video
from serve_app.finish.equipment import Equipment
from serve_app.finish.extras import Preview, Stills
from serve_app.finish.failure import FinishFailed, FinishStopped
from serve_app.finish.interpolate import interpolate
from serve_app.finish.label import add_xmp, sentence, xmp
from serve_app.finish.mark import Mark
from serve_app.finish.ordered import MeasuredPool, Pool
from serve_app.finish.plan import Encode, Finish, Label, VideoFormat
from serve_app.finish.torch_models import load_interpolator, load_upscaler
from serve_app.finish.upscale import Enlarge, by_lanczos, by_model, upscale


@dataclass(frozen=True)
class FinishedVideo:
    """The files of a finished video.

    Attributes:
        path: the video.
        content_type: its media type.
        format: its size and length.
        extras: further files by name: `preview` (webp or gif), `stills` (zip).
        seconds: time that each step was at work, by step. Steps work beside each other, so that the sum may be more
            than the time that passed.
        warnings: sentences for the user.
    """

    path: Path
    content_type: str
    format: VideoFormat
    extras: Mapping[str, Path] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def finish_video(
    frames: Iterator[np.ndarray],
    source: VideoFormat,
    finish: Finish,
    folder: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    equipment: Equipment | None = None,
    progress: Callable[[str, float], None] = lambda step, share: None,
    stop: Callable[[], bool] = lambda: False,
) -> FinishedVideo:
    """Finish a video while its frames come. Memory does not grow with its length.

    Args:
        frames: yields `source.num_frames` arrays `[height, width, 3]`, uint8 RGB, and may block until the next is
            there. An error that it raises is passed on unchanged.
        source: format of the frames.
        finish: the plan; one without steps writes the video as it is.
        folder: existing folder for the files, which are complete when this returns.
        metadata: JSON-able, for the file's comment, as `write_mp4` takes it.
        equipment: the machine, and the operator's models and certificate.
        progress: called from any thread with a step and the share of its work that is done, 0 to 1.
        stop: asked before each frame whether to give up.

    Raises:
        FinishFailed: a step failed; it names the step.
        FinishStopped: `stop` returned True.
    """
    cv2.setNumThreads(1)  # whole frames are made beside each other, which keeps more cores at work than parts of one
    return _Run(frames, source, finish, folder, dict(metadata or {}), equipment or Equipment(), progress, stop).run()


class _Run:
    """The finishing of one video; see `finish_video` for the arguments."""

    def __init__(
        self,
        frames: Iterator[np.ndarray],
        source: VideoFormat,
        finish: Finish,
        folder: Path,
        metadata: dict[str, Any],
        equipment: Equipment,
        progress: Callable[[str, float], None],
        stop: Callable[[], bool],
    ) -> None:
        self._frames = frames
        self._source = source
        self._finish = finish
        self._folder = folder
        self._metadata = metadata
        self._equipment = equipment
        self._progress = progress
        self._stop = stop
        self._encode = finish.encode or Encode()
        self._label = finish.label or Label()
        self._version = version("serve-app")
        self._xmp = xmp(metadata, self._version) if self._label.metadata else ""
        self._sentence = sentence(metadata, self._version) if self._label.metadata else ""
        self._ahead = equipment.workers + 1
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._passed: BaseException | None = None
        self._warnings: list[str] = []

    def run(self) -> FinishedVideo:
        path = self._folder / f"video.{self._encode.container}"
        with ExitStack() as stack:
            pool = ThreadPoolExecutor(self._equipment.workers, "finish")
            stack.callback(pool.shutdown, cancel_futures=True)
            frames, video = self._checked(), self._source
            for step in self._finish.order:
                with self._failing(step):
                    after = Finish.model_validate({step: getattr(self._finish, step)}).result(video)
                    make = self._interpolated if step == "interpolate" else self._upscaled
                    measured = MeasuredPool(pool, partial(self._busy, step))
                    frames = self._watched(step, make(frames, video, measured), after.num_frames)
                video = after
            frames = self._marked(frames, video)
            with self._failing("encode"):
                made, extras = self._encoded(frames, video, path)
        with self._failing("label"), self._busy("label"):
            self._labelled(path, extras)
        self._progress("label", 1.0)
        content_type = CONTENT_TYPES[self._encode.container]
        return FinishedVideo(path, content_type, made, extras, dict(self._seconds), tuple(self._warnings))

    def _checked(self) -> Iterator[np.ndarray]:
        """Yield the frames, and ask before each whether to stop."""
        try:
            for frame in self._frames:
                self._check_stop()
                yield frame
        except Exception as error:
            self._passed = error  # no step failed
            raise

    def _check_stop(self, count: int = 0) -> None:
        if self._stop():
            raise FinishStopped

    @contextmanager
    def _failing(self, step: str) -> Iterator[None]:
        """Turn an error into one that names the step, unless it comes from the frames or another step."""
        try:
            yield
        except (FinishFailed, FinishStopped):
            raise
        except Exception as error:
            if error is self._passed:
                raise
            message = str(error) if isinstance(error, (ValueError, ImportError)) else one_line(error)
            raise FinishFailed(step, message.strip().splitlines()[0][:300]) from error

    @contextmanager
    def _busy(self, step: str) -> Iterator[None]:
        """Measure the time of some work of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[step] = self._seconds.get(step, 0.0) + time.perf_counter() - began

    def _watched(self, step: str, frames: Iterator[np.ndarray], expected: int) -> Iterator[np.ndarray]:
        """Yield the frames of a step, report its progress, and name it in errors."""
        with self._failing(step):
            for count, frame in enumerate(frames, 1):
                self._progress(step, min(count / expected, 1.0))
                yield frame

    def _interpolated(self, frames: Iterator[np.ndarray], video: VideoFormat, pool: Pool) -> Iterator[np.ndarray]:
        plan = self._finish.interpolate
        assert plan is not None
        model = None
        if plan.model:
            file = _named(self._equipment.interpolators, "interpolate.model", plan.model)
            model = load_interpolator(file, self._equipment.device)
        return interpolate(frames, video.fps, plan.fps, pool, self._ahead, model)

    def _upscaled(self, frames: Iterator[np.ndarray], video: VideoFormat, pool: Pool) -> Iterator[np.ndarray]:
        plan = self._finish.upscale
        assert plan is not None
        enlarge: Enlarge = by_lanczos(plan.factor)
        if plan.model:
            file = _named(self._equipment.upscalers, "upscale.model", plan.model)
            enlarge = by_model(load_upscaler(file, self._equipment.device), plan.factor)
        return upscale(frames, enlarge, pool, self._ahead)

    def _marked(self, frames: Iterator[np.ndarray], video: VideoFormat) -> Iterator[np.ndarray]:
        if self._label.mark is None:
            return frames
        with self._failing("label"):
            mark = Mark(self._label.mark, video.width, video.height, self._equipment.font)

        def drawn() -> Iterator[np.ndarray]:
            for frame in frames:
                with self._busy("label"):
                    marked = mark.draw(frame)
                yield marked

        return self._watched("label", drawn(), video.num_frames)

    def _encoded(
        self, frames: Iterator[np.ndarray], video: VideoFormat, path: Path
    ) -> tuple[VideoFormat, dict[str, Path]]:
        """Write the video and what else is asked for. Return the video's size and length, and the other files."""
        extras: dict[str, Path] = {}
        takers: list[Callable[[int, np.ndarray], None]] = []
        preview = stills = None
        if kind := self._encode.preview:
            extras["preview"] = self._folder / f"preview.{kind}"
            preview = Preview(kind, video, self._xmp, self._sentence)
            takers.append(preview.add)
        with ExitStack() as stack:
            if pictures := self._encode.stills:
                extras["stills"] = self._folder / "stills.zip"
                stills = Stills(extras["stills"], pictures, self._xmp)
                stack.callback(stills.close)
                takers.append(stills.add)
            tags = {"comment": comment(self._metadata)}
            if self._sentence:
                tags["description"] = self._sentence
            made = write_video(
                self._tapped(frames, takers, video.num_frames),
                video,
                self._encode,
                path,
                tags,
                self._equipment.workers,
                lambda: self._busy("encode"),
                self._check_stop,
            )
        if preview is not None:
            with self._busy("encode"):
                preview.save(extras["preview"])
        return made, extras

    def _tapped(
        self, frames: Iterator[np.ndarray], takers: list[Callable[[int, np.ndarray], None]], expected: int
    ) -> Iterator[np.ndarray]:
        """Yield the frames to the encoder, and give each to the other files too."""
        for index, frame in enumerate(frames):
            for take in takers:
                with self._busy("encode"):
                    take(index, frame)
            yield frame
            self._progress("encode", min((index + 1) / expected, 1.0))

    def _labelled(self, path: Path, extras: dict[str, Path]) -> None:
        """Add to complete files what says that a machine made them."""
        if self._xmp and path.suffix == ".mp4":
            add_xmp(path, self._xmp)
        able = self._equipment.certificate is not None and self._equipment.private_key is not None
        if self._label.c2pa and not able:
            raise ValueError("'label.c2pa' is true, expected a certificate and a key on this server")
        if not able or self._label.c2pa is False:
            return
        for file in (path, *extras.values()):
            if file.suffix.lstrip(".") in manifest.FORMATS:
                manifest.sign(file, self._metadata, self._version, self._equipment)
            elif file.suffix == ".webm":
                self._warnings.append("A webm file cannot hold a C2PA manifest; this one has none.")


def _named(files: Mapping[str, Path], option: str, name: str) -> Path:
    if name not in files:
        raise ValueError(f"'{option}' has value '{name}', expected one of {sorted(files) or 'none, on this server'}")
    return files[name]
