"""Events of a running job, from the engine up to the client. Plain, picklable, free of model code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

StageName = Literal["encode", "denoise", "decode", "finish"]


@dataclass(frozen=True)
class Progress:
    """A stage has begun, or one of its steps is done.

    Attributes:
        stage: which one.
        step: steps that are done, from 0 (the stage has begun) to `steps` (it has ended).
        steps: how many the stage has.
        seconds_left: estimated seconds until the video is there; None while nothing is known.
        saved_step: the latest denoising step whose state is saved in this group; 0 if none is.
    """

    stage: StageName
    step: int
    steps: int
    seconds_left: float | None = None
    saved_step: int = 0


@dataclass(frozen=True)
class Done:
    """The video is stored.

    Attributes:
        outputs: storage keys of `video`, `thumbnail` and `spritesheet`. Where the video was finished, also of `plain`,
            the video as it was decoded, and of `preview` and `stills` if they were asked for.
        timings: seconds by stage.
        size_bytes: size of the video's file.
        warnings: sentences for the user, of a truncated prompt for example.
        revision: names the weights that made the video.
        finished: size and length of the finished video, its media type and the seconds of each step; None if the video
            is as it was decoded.
        finish_gpu_seconds: GPU-seconds of the finishing, where finishers have GPUs.
        group_s: its share of the seconds of its groups' passes; None if not known.
        passes: its share of these passes; None if not known.
    """

    outputs: dict[str, str]
    timings: dict[str, float]
    size_bytes: int
    warnings: list[str] = field(default_factory=list)
    revision: str | None = None
    finished: dict[str, Any] | None = None
    finish_gpu_seconds: float = 0.0
    group_s: float | None = None
    passes: float | None = None


Event = Progress | Done
