"""The file of a simulated fleet: what works, how fast it is, how it is scaled, and what is asked of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt

from serve_app.config import AdmissionConfig, Ageing, DegradeConfig, DenoiserConfig, Priority
from serve_app.config.section import NonNegativeFloat, Section
from serve_app.config.tree import checked
from serve_app.degrade import Floor
from serve_app.engine.virtual_group import PassCost
from serve_app.errors import ConfigError
from serve_app.parameters import SIDE_MULTIPLE
from serve_app.request import Params
from serve_app.wan.cost import video_tflop

A14B: dict[str, Any] = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "num_layers": 40,
    "patch_size": [1, 2, 2],
}
"""Shape of an expert of Wan2.2-T2V-A14B, by which work is counted."""


class Clip(Section):
    """A kind of video, and how often it is asked for."""

    width: PositiveInt = Field(1280, multiple_of=SIDE_MULTIPLE)
    """Width in pixels."""
    height: PositiveInt = Field(720, multiple_of=SIDE_MULTIPLE)
    """Height in pixels."""
    num_frames: PositiveInt = 81
    """Number of frames."""
    num_inference_steps: PositiveInt = 40
    """Number of denoising steps."""
    weight: NonNegativeFloat = 1.0
    """Share among all kinds, relative to the other weights."""

    @property
    def params(self) -> Params:
        """The parameters of a request for it; those that do not count are A14B's defaults."""
        return Params(
            **self.model_dump(exclude={"weight"}),
            prompt="x",
            negative_prompt="",
            fps=16,
            seed=0,
            guidance_scale=4.0,
            guidance_scale_2=3.0,
            flow_shift=12.0,
            boundary_ratio=0.875,
        )


class Demand(Section):
    """The jobs that are asked for: a day's curve times bursts, owners of very different size, a mix of sizes."""

    load: PositiveFloat = 0.7
    """Work that is asked for, on average, as a share of what all groups can do."""
    peak: float = Field(1.0, ge=1, le=2)
    """Rate at the busiest hour of a day over the average rate. 1 is the same all day."""
    burst_s: PositiveFloat = 600
    """Seconds after which a burst ends and another one begins."""
    burst_shape: NonNegativeFloat = 0
    """Shape of the Gamma distribution, of mean 1, that each burst multiplies the rate by. Small is rough; 0 is none."""
    owners: PositiveInt = 200
    """Number of owners."""
    zipf: NonNegativeFloat = 1.1
    """Exponent of the owners' shares: the n-th has 1/n to this power. 0 is all alike."""
    clips: tuple[Clip, ...] = (Clip(weight=0.3), Clip(width=832, height=480, weight=0.7))
    """Kinds of videos."""
    classes: dict[Priority, NonNegativeFloat] = Field({"interactive": 0.2, "standard": 0.5, "batch": 0.3})
    """Shares of the priority classes."""
    may_degrade: float = Field(0.0, ge=0, le=1)
    """Share of the jobs that agree to `floor` under load."""
    floor: dict[str, str | int] = Field({"min_size": "832x480", "min_steps": 20})
    """The least that these agree to, as a request spells it."""


class Fleet(Section):
    """A fleet and its demand. `denoiser`, `ageing`, `admission` and `degrade` are those of a server's configuration."""

    hours: PositiveFloat = 24
    """Hours in which jobs come. The simulation goes on until all have ended."""
    seed: int = 0
    """Seed of all that is random."""
    gpus: PositiveInt = 2
    """GPUs of a group."""
    denoise_s: PositiveFloat = 375
    """Seconds that a group takes for the steps of a 1280x720 video of 81 frames and 40 steps."""
    fixed_s: NonNegativeFloat = 0.03
    """Part of a forward pass that does not grow with its work, in seconds."""
    noise: NonNegativeFloat = 0.02
    """Standard deviation of a job's work, as a share of it."""
    encode_s: NonNegativeFloat = 0.5
    """Seconds of a text encoder."""
    decode_s: NonNegativeFloat = 4
    """Seconds of a decoder for a 1280x720 video of 81 frames; others by their pixels."""
    decoders: PositiveInt = 1
    """Number of decoders."""
    start_s: NonNegativeFloat = 120
    """Seconds until a group that was asked for takes jobs."""
    running_jobs: PositiveInt = 64
    """Jobs that the dispatchers drive at once."""
    look_s: PositiveFloat = 30
    """Seconds between two looks of autoscaling and degrading."""
    router: Literal["emptiest", "two", "soonest"] = "emptiest"
    """`emptiest`: the group with the fewest samples, as the server has it. `two`: Serve's own router, the emptier of
    two groups at random. `soonest`: the group with the least work left."""
    denoiser: DenoiserConfig = DenoiserConfig()
    ageing: Ageing = Ageing()
    admission: AdmissionConfig = AdmissionConfig()
    degrade: DegradeConfig | None = None
    """None: nobody gets less than they asked for."""
    demand: Demand = Demand()

    @property
    def cost(self) -> PassCost:
        """Seconds of a pass."""
        clip = Clip()
        passes_s = self.denoise_s - clip.num_inference_steps * self.fixed_s
        if passes_s <= 0:
            raise ConfigError(f"fixed_s has value {self.fixed_s:g}, expected less than {self.denoise_s / 40:g}")
        return PassCost(self.fixed_s, passes_s / work_of(clip.params))

    @property
    def floor(self) -> Floor | None:
        """The least that jobs agree to if they agree to less."""
        return Floor.parse(self.demand.floor)


def work_of(params: Params) -> float:
    """Return the TFLOP of a video by A14B."""
    return _work(params.width, params.height, params.num_frames, params.num_inference_steps)


@cache
def _work(width: int, height: int, frames: int, steps: int) -> float:
    clip = Clip(width=width, height=height, num_frames=frames, num_inference_steps=steps)
    return video_tflop(A14B, clip.params)


def load_fleet(path: Path) -> Fleet:
    """Return the fleet of a YAML file.

    Raises:
        ConfigError: it cannot be read, or an option cannot work.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"FLEET has value '{path}', expected a YAML file: {str(error).splitlines()[0]}") from None
    fleet = checked(Fleet, content, str(path))
    _ = fleet.cost
    return fleet
