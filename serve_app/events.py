"""What a running job reports, from the engine up to the client. Plain, picklable, free of model code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

StageName = Literal["encode", "denoise", "decode"]


@dataclass(frozen=True)
class Progress:
    """One step of a stage is done.

    `step` counts from 0 (the stage has begun) to `steps` (it has ended). `seconds_left` estimates the time until the
    video is there, and is None while nothing is known.
    """

    stage: StageName
    step: int
    steps: int
    seconds_left: float | None = None


@dataclass(frozen=True)
class Done:
    """The video is stored.

    `outputs` maps `video`, `thumbnail` and `spritesheet` to storage keys; `timings` maps a stage to its seconds;
    `warnings` holds sentences for the user (a truncated prompt, say); `revision` names the weights that made it.
    """

    outputs: dict[str, str]
    timings: dict[str, float]
    size_bytes: int
    warnings: list[str] = field(default_factory=list)
    revision: str | None = None


Event = Progress | Done
