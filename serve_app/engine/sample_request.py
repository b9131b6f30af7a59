"""What goes into an engine and what comes out of it. Plain and picklable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from serve_app.config import Priority
from serve_app.request import Params


@dataclass(frozen=True)
class SampleRequest:
    """What a sample is and how urgent; the same wherever and however often it is denoised.

    `created_at` is when its job was created (seconds since the epoch), from which its waiting counts. Its states are
    saved under `state_prefix`, or not at all if that is None. `alone` keeps it out of other samples' forward passes:
    a group was lost with it, and if it is the reason, they shall not go down with it again.
    """

    id: str
    params: Params
    priority: Priority = "standard"
    created_at: float = 0.0
    state_prefix: str | None = None
    alone: bool = False


@dataclass(frozen=True)
class EncodedRequest:
    """A sample that asks to be denoised.

    Embeddings are float arrays [tokens, dim]; `negative` is None unguided. `state` is where to go on, None to begin.
    """

    ticket: SampleRequest
    positive: np.ndarray
    negative: np.ndarray | None
    state: bytes | None = None


@dataclass(frozen=True)
class Denoised:
    """The end of a sample: latents, float32 [1, channels, frames, height, width], and the seconds it was here."""

    latents: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Moved:
    """The sample is to go on in another group.

    `state` is where, None if nothing was done here: then with whatever it came with. `high_noise` says which expert
    does the next step, None if that is not known here. `seconds` is how long it was here.
    """

    state: bytes | None = None
    high_noise: bool | None = None
    seconds: float = 0.0
