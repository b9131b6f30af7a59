"""The finisher: chains the steps of a plan over frames that come one by one, and returns the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from serve_app.finish.plan import Finish, VideoFormat


@dataclass(frozen=True)
class Equipment:
    """The machine and the files of its operator that steps may use.

    Attributes:
        threads: most threads at work on one video; 0 is one for each core that the process may use.
        device: where operator's models run, as torch names it: `cpu`, `cuda`, `cuda:1`.
        upscalers: files of upscaling models by name.
        interpolators: files of interpolation models by name.
        certificate: PEM file with the chain of certificates that signs C2PA manifests, the signer's first; None signs
            nothing.
        private_key: PEM file of its key.
        timestamp_url: time-stamping authority whose word goes into manifests; empty is none.
    """

    threads: int = 0
    device: str = "cpu"
    upscalers: Mapping[str, Path] = field(default_factory=dict)
    interpolators: Mapping[str, Path] = field(default_factory=dict)
    certificate: Path | None = None
    private_key: Path | None = None
    timestamp_url: str = ""


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
    equipment: Equipment = Equipment(),
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
        equipment: the operator's models and certificate.
        progress: called from any thread with a step and the share of its work that is done, 0 to 1.
        stop: asked before each frame whether to give up.

    Raises:
        FinishFailed: a step failed; it names the step.
        FinishStopped: `stop` returned True.
    """
    raise NotImplementedError
