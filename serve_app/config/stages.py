"""The deployments of the pipeline's application."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from serve_app.config.section import Device, NonNegativeFloat, Section

_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
_LEAST = 0.0001


class Resources(Section):
    """What Ray reserves for one process."""

    num_cpus: NonNegativeFloat = 1
    num_gpus: NonNegativeFloat = 0
    resources: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Custom Ray resources that it uses up."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that its host must have, e.g. `{pool: h200}`; a value may be `in(a, b)` or `!a`."""

    @model_validator(mode="after")
    def _grantable(self) -> Resources:
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(f"num_gpus is {self.num_gpus:g}, expected a whole number, or a share below 1")
        for name in self.resources:
            if not name.strip() or name in _RAYS_OWN:
                raise ValueError(f"resources has {name!r}, expected the name of a custom resource (num_cpus, num_gpus)")
        for name, amount in {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, **self.resources}.items():
            if 0 < amount < _LEAST:
                raise ValueError(f"{name} is {amount:g}, expected 0 or at least {_LEAST:g}, the least that Ray counts")
        return self


class Autoscaling(Section):
    """How many replicas, by the number of requests that wait or run."""

    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    target_queue_length: PositiveFloat = 2
    """Requests per replica, running and waiting, that the autoscaler aims at."""
    upscale_delay_s: NonNegativeFloat = 10
    downscale_delay_s: NonNegativeFloat = 300
    look_back_s: float = Field(20, gt=10)
    """Length of the window over which the queue length is averaged; Ray counts every 10 seconds."""

    @model_validator(mode="after")
    def _order(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, expected at most {self.max_replicas} (max_replicas)"
            )
        return self


class Batch(Section):
    """The window of a `@serve.batch`."""

    size: PositiveInt = 1
    wait_s: NonNegativeFloat = 0.0
    """How long the first request of a batch waits for others."""


class Stage(Section):
    """What the three stages have in common."""

    device: Device = "auto"
    memory_fraction: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory that each process of the stage may take. Those that share a GPU, by `num_gpus` below 1,
    may not add up to more than 1, and 0.9 leaves room for what allocators do not count, as each one's CUDA context."""
    threads: int = Field(0, ge=0)
    """CPU threads of the stage's math in one process; 0 is all cores, shared among the ranks of a group."""
    autoscaling: Autoscaling = Autoscaling()
    max_ongoing_requests: PositiveInt = 64
    warmup: bool = True
    """Run once before the replica reports ready, so that the first request is not a slow one."""
    health_check_period_s: PositiveFloat = 5
    health_check_timeout_s: PositiveFloat = 10


class EncoderConfig(Stage):
    """The text encoder."""

    resources: Resources = Resources(num_cpus=1, num_gpus=1)
    batch: Batch = Batch(size=8, wait_s=0.02)


class ParallelConfig(Section):
    """How the ranks of a group share a step; there are as many as the product. Or only how many: then the group picks,
    by the memory of its devices, and logs what and why.
    """

    tensor: PositiveInt = 1
    """Ranks that share every layer's weights. Must divide the attention heads and the feed-forward width."""
    guidance: Literal[1, 2] = 1
    """2: each half of classifier-free guidance has ranks of its own."""
    sequence: PositiveInt = 1
    """Ranks that share the tokens of a sample. Must divide the heads that tensor parallelism leaves a rank."""
    ranks: PositiveInt | None = None

    @model_validator(mode="after")
    def _either(self) -> ParallelConfig:
        given = {"tensor", "guidance", "sequence"} & self.model_fields_set
        if self.ranks is not None and given:
            raise ValueError(f"ranks is {self.ranks} and {min(given)} is given as well, expected one or the other")
        return self

    @property
    def size(self) -> int:
        """Ranks of a group."""
        return self.ranks or self.guidance * self.sequence * self.tensor


class DenoiserConfig(Stage):
    """A group of ranks that denoise."""

    parallel: ParallelConfig = ParallelConfig()
    rank: Resources = Resources(num_cpus=1, num_gpus=1)
    coordinator_cpus: NonNegativeFloat = 1
    placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    """Ray placement strategy of a group. STRICT_PACK keeps its ranks on one host, where links are fast."""
    batch: Batch = Batch(size=4, wait_s=0.005)
    """Of the admissions: samples that arrive together start together."""
    experts: Literal["together", "swap", "split"] = "together"
    """`together`: every rank holds both. `swap`: both in host memory, the one in use on the device as well.
    `split`: two deployments with one expert each, which hand samples over at the boundary."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """For devices smaller than an expert, with `experts` `swap` or `split`: where those of its blocks wait that do not
    stay on the device. `cpu`: in pinned host memory. `disk`: in the files of `model.sharded`, and host memory holds
    two blocks."""
    resident_blocks: int | None = Field(None, ge=0)
    """With `offload`, blocks that stay on the device; two more pass through it. None is as many as leave room for the
    largest request that `limits` allow."""
    low_noise_autoscaling: Autoscaling | None = None
    """With `experts: split`, of the low-noise expert's replicas; `autoscaling` is then that of the high-noise ones, and
    of both if this is not given."""
    samples_per_step: PositiveInt = 1
    """Samples of equal shape that may share a forward pass."""
    tokens_per_step: PositiveInt = 80_000
    """Tokens that a shared forward pass may hold; a single sample may exceed it."""
    step_memory_mib: NonNegativeFloat = 0
    """Working memory that a shared forward pass may take on one rank; a single sample may exceed it. 0 is no bound."""
    resident_samples: PositiveInt = 8
    """Samples whose state a group holds at once; others wait outside."""
    parked_memory_mib: NonNegativeFloat = 4096
    """Device memory for the state of samples that do not take part in a step; the least urgent beyond it are kept in
    host memory."""
    text_cache_mib: NonNegativeFloat = 1024
    """Device memory of each expert on a rank for the keys and values of the texts in the last forward pass, which the
    next one uses again if the same samples step. A batch beyond it has them made anew at every step."""
    attention: Literal["auto", "flash4", "flash3", "cudnn", "flash", "native"] = "auto"
    """The kernel of attention. `auto` is the fastest that works on the ranks' device; the log says which and why."""
    symmetric_memory: bool = True
    """Whether ranks that share weights send each other what they need by copies between their devices, where NVLink
    joins them and a trial at the start goes well; else by NCCL. The log says which and why."""
    compile: bool = False
    """Compile the experts' blocks at the start, for GPUs. Steps then differ from others by rounding."""
    checkpoint_s: NonNegativeFloat = 30
    """A sample that was denoised for this long since it was last saved is saved again, for another group to continue if
    this one is lost. 0 is never."""
    profile: str = ""
    """Folder on the ranks' hosts, by its absolute path, into which they write what kernels each step consists of; empty
    is none. To find out what makes steps slow: writing them costs a moment between steps."""
    fuse_guidance_tokens: int = Field(8192, ge=0)
    """Up to this many tokens both halves of guidance run as one forward pass."""
    step_timeout_s: PositiveFloat = 600
    """A step that takes longer counts as hung, and the group is replaced."""
    start_timeout_s: PositiveFloat = 1800
    """Time for the ranks to start and load."""
    shutdown_timeout_s: PositiveFloat = 3600
    """How long a replica that is scaled down or replaced may go on with its samples; at least the longest job."""

    @model_validator(mode="after")
    def _profile_is_the_same_everywhere(self) -> DenoiserConfig:
        if self.profile and not self.profile.startswith("/"):
            raise ValueError(f"profile is '{self.profile}', expected an absolute path")
        return self

    @model_validator(mode="after")
    def _offload_of_one_expert(self) -> DenoiserConfig:
        if self.offload != "none" and self.experts == "together":
            raise ValueError(f"experts is 'together' with offload {self.offload!r}, expected 'swap' or 'split'")
        if self.resident_blocks is not None and self.offload == "none":
            raise ValueError(f"resident_blocks is {self.resident_blocks}, expected with offload 'cpu' or 'disk' only")
        return self


class DecoderConfig(Stage):
    """The VAE and the video encoder."""

    resources: Resources = Resources(num_cpus=1, num_gpus=1)
    devices: PositiveInt = 1
    """GPUs of one replica, each with a copy of the VAE, among which every picture is shared out. With a share of a GPU
    in `resources`, those of its host from the one that it shares on; `memory_fraction` must be free on all of them."""
    tile_memory_mib: NonNegativeFloat = 0
    """Working memory that a decode may take on each device, beside the weights: pictures are cut into tiles that fit.
    0 is what is free on a GPU, and no bound on CPUs."""
    batch: Batch = Batch(size=1, wait_s=0.0)
    """One video fills a device, and alone its pixels are the same every time; batch mates change the last bits."""
    store_wait_s: NonNegativeFloat = 3600
    """How long a finished sample is kept in memory while the storage does not take its video."""

    @model_validator(mode="after")
    def _devices_are_reserved(self) -> DecoderConfig:
        reserved = self.resources.num_gpus
        if max(self.devices, reserved) > 1 and self.devices != reserved and not 0 < reserved < 1:
            expected = "as many" if self.devices == 1 else "as many, or a share of one"
            raise ValueError(f"resources.num_gpus is {reserved:g} with {self.devices} devices, expected {expected}")
        if self.devices > 1 and self.device == "cpu":
            raise ValueError(f"devices is {self.devices}, expected 1, because device is 'cpu'")
        return self


class PipelineConfig(Section):
    """The deployment that composes the stages."""

    autoscaling: Autoscaling = Autoscaling(target_queue_length=32)
    num_cpus: NonNegativeFloat = 0.1
    max_ongoing_requests: PositiveInt = 256
