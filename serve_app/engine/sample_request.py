"""Requests to an engine, and how a sample ends there. Plain and picklable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from serve_app.config import Priority
from serve_app.request import Params


@dataclass(frozen=True)
class SampleRequest:
    """A sample and its urgency; the same wherever and however often it is denoised.

    Attributes:
        id: its name, unique among all samples that run at the same time.
        params: all that determines its pixels.
        priority: the job's class.
        created_at: when the job began to wait, in seconds since the epoch.
        state_prefix: storage folder of its saved states; None if none are saved.
        alone: whether to keep it out of other samples' forward passes. Set where a group was lost with it: if it is the
            reason, no other sample shall be lost with it again.
    """

    id: str
    params: Params
    priority: Priority = "standard"
    created_at: float = 0.0
    state_prefix: str | None = None
    alone: bool = False


@dataclass(frozen=True)
class EncodedRequest:
    """A sample that is ready to be denoised.

    Attributes:
        request: the sample.
        positive: embedding of the prompt, float [tokens, dim].
        negative: embedding of the negative prompt, float [tokens, dim]; None without guidance.
        state: where to go on; None to begin.
    """

    request: SampleRequest
    positive: np.ndarray
    negative: np.ndarray | None
    state: bytes | None = None


@dataclass(frozen=True)
class Denoised:
    """The end of a sample.

    Attributes:
        latents: float32 [1, channels, frames, height, width].
        seconds: how long it was in this engine.
        group_s, passes: as in `Flight`.
    """

    latents: np.ndarray
    seconds: float
    group_s: float = 0.0
    passes: float = 0.0


@dataclass(frozen=True)
class Moved:
    """A sample that is to go on in another group.

    Attributes:
        state: where to go on; None if no step was made here, so that it goes on from the state it came with.
        high_noise: whether the high-noise expert does the next step; None if that is not known here.
        seconds: how long it was in this engine.
        group_s, passes: as in `Flight`.
    """

    state: bytes | None = None
    high_noise: bool | None = None
    seconds: float = 0.0
    group_s: float = 0.0
    passes: float = 0.0
