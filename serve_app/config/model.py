"""The weights, and the defaults and limits of requests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from serve_app.config.paths import home_of
from serve_app.config.section import Section
from serve_app.parameters import SIDE_MULTIPLE, Configured

LONGEST_SIDE = 16384
"""Longest side of a frame, in pixels, that the H.264 encoder takes."""


class ModelConfig(Section):
    """The weights that are served."""

    path: str = "tiny"
    """A folder in the diffusers layout, or `tiny` for the model inside the package."""
    name: str = "wan2.2-t2v-a14b"
    """Id that `/v1/models` lists and requests may name."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of the experts and the text encoder. Modules that diffusers keeps in float32 stay so."""
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the VAE."""
    weights: Literal["files", "random"] = "files"
    """`files` reads the weights. `random` draws weights of the same shapes, for measurements; it is refused unless the
    environment variable WAN_SERVE_BENCHMARK is 1, since videos are noise."""
    sharded: str | None = None
    """A sharded checkpoint: a folder that `wan-serve prepare` wrote from `path` for `denoiser.parallel.tensor` ranks in
    `dtype`. Each rank reads its own file there; everything but the experts' weights is still read from `path`. None:
    each rank cuts its shard from the files in `path`."""

    @model_validator(mode="after")
    def _random_is_for_benchmarks(self) -> ModelConfig:
        if self.weights == "random" and os.environ.get("WAN_SERVE_BENCHMARK") != "1":
            raise ValueError(
                "weights is 'random', expected 'files': videos would be noise, which needs WAN_SERVE_BENCHMARK=1"
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
        """True if this is the tiny model inside the package, which draws a few shapes and nothing else."""
        from serve_app.tiny import CHECKPOINT

        return self.folder == CHECKPOINT

    @property
    def itemsize(self) -> int:
        """Size in bytes of a number in `dtype`."""
        return 4 if self.dtype == "float32" else 2

    @property
    def random(self) -> bool:
        """True if weights are drawn instead of read."""
        return self.weights == "random"

    @property
    def sharded_folder(self) -> Path | None:
        """The folder that `sharded` names."""
        return None if self.sharded is None else home_of("model.sharded", self.sharded)


class Defaults(Section, Configured):
    """Values of the generation parameters that a request does not give."""

    @property
    def tokens(self) -> int:
        """Number of tokens of a sample of this size."""
        return _tokens(self.width * self.height, self.num_frames)


class Limits(Section):
    """Largest values that a request may ask for."""

    prompt_chars: PositiveInt = 4000
    """Characters of a prompt, and of a negative prompt."""
    pixels: PositiveInt = 1280 * 720
    """Width times height of a frame, in pixels."""
    side: int = Field(LONGEST_SIDE, ge=SIDE_MULTIPLE, le=LONGEST_SIDE)
    """Width or height of a frame, in pixels. The limit is lower if the model has fewer positions."""
    num_frames: PositiveInt = 161
    """Number of frames."""
    num_inference_steps: PositiveInt = 100
    """Number of denoising steps."""
    fps: PositiveInt = 60
    """Frames per second."""
    queued_jobs: PositiveInt = 1000
    """Waiting jobs. A create request beyond this number is answered 429."""
    body_bytes: PositiveInt = 1 << 20
    """Size of a request's body, in bytes."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the largest sample."""
        return _tokens(self.pixels, self.num_frames)


def _tokens(pixels: int, frames: int) -> int:
    """Return the number of tokens: one for 16x16 pixels of the first frame, and of every four further ones."""
    return -(-pixels // 256) * ((frames - 1) // 4 + 1)
