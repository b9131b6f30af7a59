"""The stage that finishes decoded videos."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from serve_app.config.section import Device, NonNegativeFloat
from serve_app.config.stages import Autoscaling, Resources, Stage
from serve_app.finish.plan import Finish


class FinisherAutoscaling(Autoscaling):
    """The number of finishers, which may be none while nobody asks for one."""

    min_replicas: int = Field(0, ge=0)
    """Smallest number of replicas. With 0 the first video that is to be finished waits for a process to start; it is
    asked for before the decode begins."""
    target_queue_length: PositiveFloat = 1
    """Requests per replica, running and waiting, that the autoscaler aims at."""


class FinisherConfig(Stage):
    """The finisher, which interpolates, upscales, encodes and labels decoded videos, on CPUs unless told otherwise."""

    enabled: bool = True
    """Let requests ask for `finish`. Without such requests the stage has no process."""
    device: Device = "auto"
    """Device of the models in `upscalers` and `interpolators`. `auto` is CUDA if `resources` ask for a GPU, else the
    CPU."""
    threads: int = Field(0, ge=0)
    """CPU threads of one process. 0 is as many as `resources.num_cpus`, or all cores where that is below 1."""
    resources: Resources = Resources(num_cpus=1)
    autoscaling: FinisherAutoscaling = FinisherAutoscaling()
    max_ongoing_requests: PositiveInt = 1
    """Videos that a replica finishes at once; further ones wait for it. One uses all of its `threads`."""
    wait_s: NonNegativeFloat = 120
    """Seconds that a denoised video waits for a finisher with a free place. Then the plain video is made."""
    progress_timeout_s: PositiveFloat = 600
    """Seconds without progress after which finishing is given up. The plain video stays."""
    pixels: PositiveInt = 5120 * 2880
    """Largest width times height of a finished frame, in pixels."""
    profiles: dict[str, Finish] = Field(default_factory=dict)
    """Plans by name, which requests may name instead of an object: `{smooth: {interpolate: {fps: 32}}}`."""
    upscalers: dict[str, str] = Field(default_factory=dict)
    """Files of upscaling models by the names that requests use."""
    interpolators: dict[str, str] = Field(default_factory=dict)
    """Files of interpolation models by the names that requests use."""
    certificate: str | None = None
    """PEM file with the certificates that sign C2PA manifests, the signer's first. None signs nothing."""
    private_key: str | None = None
    """PEM file with the key of the signer's certificate."""
    timestamp_url: str = ""
    """URL of a time-stamping authority for manifests; empty is none."""

    font: str | None = None
    """TrueType file for visible marks. None is a built-in font with Latin letters only."""

    @model_validator(mode="after")
    def _key_of_the_certificate(self) -> FinisherConfig:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key are given alone, expected both or neither")
        return self

    @model_validator(mode="after")
    def _profiles_have_models(self) -> FinisherConfig:
        for name, finish in self.profiles.items():
            for step, part, models in (
                ("interpolate", finish.interpolate, self.interpolators),
                ("upscale", finish.upscale, self.upscalers),
            ):
                if part is not None and part.model is not None and part.model not in models:
                    expected = ", ".join(sorted(models)) or "none, since no models are named"
                    raise ValueError(f"profiles.{name}.{step}.model is {part.model!r}, expected {expected}")
        return self
