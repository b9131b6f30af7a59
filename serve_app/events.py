"""Events of a running job, from the engine up to the client. Plain, picklable, free of model code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

StageName = Literal["encode", "denoise", "decode"]


@dataclass(frozen=True)
class Progress:
    """A stage has begun, or one of its steps is done.

    Attributes:
        stage: which one.
        step: steps that are done, from 0 (the stage has begun) to `steps` (it has ended).
        steps: how many the stage has.
        seconds_left: estimated seconds until the video is there; None while nothing is known.
    """

    stage: StageName
    step: int
    steps: int
    seconds_left: float | None = None


@dataclass(frozen=True)
class Done:
    """The video is stored.

    Attributes:
        outputs: storage keys of `video`, `thumbnail` and `spritesheet`.
        timings: seconds by stage.
        size_bytes: size of the video's file.
        warnings: sentences for the user, of a truncated prompt for example.
        revision: names the weights that made the video.
    """

    outputs: dict[str, str]
    timings: dict[str, float]
    size_bytes: int
    warnings: list[str] = field(default_factory=list)
    revision: str | None = None


Event = Progress | Done
