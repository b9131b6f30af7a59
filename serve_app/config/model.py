"""The weights, and what requests get and may ask for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from serve_app.config.paths import home_of
from serve_app.config.section import Section
from serve_app.parameters import SIDE_MULTIPLE, Configured

LONGEST_SIDE = 16384
"""Pixels that the encoder of H.264 takes."""


class ModelConfig(Section):
    """Which weights to serve."""

    path: str = "tiny"
    """A folder in the diffusers layout, or `tiny` for the model inside the package."""
    name: str = "wan2.2-t2v-a14b"
    """The id that `/v1/models` lists and requests may name."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the experts and the text encoder; modules that diffusers keeps in float32 stay so."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    weights: Literal["files", "random"] = "files"
    """`random` draws them, of the shapes that the files have, for measurements: refused unless the environment variable
    WAN_SERVE_BENCHMARK is 1, since videos are noise."""
    sharded: str | None = None
    """A folder that `wan-serve prepare` wrote from `path` for `denoiser.parallel.tensor` ranks in `dtype`: each reads
    its own file there; all but the experts' weights stays in `path`. None: each cuts its shard from `path`."""

    @model_validator(mode="after")
    def _no_noise(self) -> ModelConfig:
        if self.weights == "random" and os.environ.get("WAN_SERVE_BENCHMARK") != "1":
            raise ValueError(
                "weights is 'random', expected 'files': only with WAN_SERVE_BENCHMARK=1 videos may be noise"
            )
        if self.weights == "random" and self.sharded is not None:
            raise ValueError("weights is 'random' and sharded is given, expected one or the other")
        return self

    @property
    def folder(self) -> Path:
        """The folder that `path` names."""
        if self.path == "tiny":
            from serve_app.tiny import CHECKPOINT

            return CHECKPOINT
        return home_of("model.path", self.path)

    @property
    def bundled(self) -> bool:
        """Whether this is the model inside the package, which draws a few shapes and nothing else."""
        from serve_app.tiny import CHECKPOINT

        return self.folder == CHECKPOINT

    @property
    def itemsize(self) -> int:
        """Bytes of a number in `dtype`."""
        return 4 if self.dtype == "float32" else 2

    @property
    def random(self) -> bool:
        """Whether weights are drawn instead of read."""
        return self.weights == "random"

    @property
    def sharded_folder(self) -> Path | None:
        """The folder that `sharded` names."""
        return None if self.sharded is None else home_of("model.sharded", self.sharded)


class Defaults(Section, Configured):
    """Generation parameters of a request that does not give them."""

    @property
    def tokens(self) -> int:
        """Tokens of a sample of this size."""
        return _tokens(self.width * self.height, self.num_frames)


class Limits(Section):
    """What a request may ask for at most."""

    prompt_chars: PositiveInt = 4000
    pixels: PositiveInt = 1280 * 720
    """Width times height of one frame."""
    side: int = Field(LONGEST_SIDE, ge=SIDE_MULTIPLE, le=LONGEST_SIDE)
    """Width or height of a frame. It is less where the model has fewer positions."""
    num_frames: PositiveInt = 161
    num_inference_steps: PositiveInt = 100
    fps: PositiveInt = 60
    queued_jobs: PositiveInt = 1000
    """Waiting jobs beyond this many are answered 429."""
    body_bytes: PositiveInt = 1 << 20
    """Size of a request's body."""

    @property
    def tokens(self) -> int:
        """Tokens of the largest sample."""
        return _tokens(self.pixels, self.num_frames)


def _tokens(pixels: int, frames: int) -> int:
    """One for 16x16 pixels of four frames, and of the first one."""
    return -(-pixels // 256) * ((frames - 1) // 4 + 1)
