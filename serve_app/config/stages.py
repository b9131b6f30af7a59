"""The deployments of the pipeline: encoder, denoiser, decoder and the one that composes them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from serve_app.config.section import Device, NonNegativeFloat, Section

_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
_LEAST = 0.0001


class Resources(Section):
    """Resources that Ray reserves for one process."""

    num_cpus: NonNegativeFloat = 1
    """CPUs that Ray reserves for one process."""
    num_gpus: NonNegativeFloat = 0
    """GPUs that Ray reserves for one process. Below 1 it is a share, and others may use the same GPU."""
    resources: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Custom Ray resources, with the amount that one process uses."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that the host must have, e.g. `{pool: h200}`; a value may be `in(a, b)` or `!a`."""

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


class TargetWait(Section):
    """Seconds within which the jobs of each priority class should begin."""

    interactive: PositiveFloat = 60
    """Seconds for `interactive` jobs."""
    standard: PositiveFloat = 600
    """Seconds for `standard` jobs."""
    batch: PositiveFloat = 3600
    """Seconds for `batch` jobs."""


class Autoscaling(Section):
    """The number of replicas."""

    by: Literal["requests", "work"] = "requests"
    """`requests`: the number of requests that wait or run at the replicas. `work`: the seconds of work that wait in the
    durable queue, for the denoiser; with it, encoder and decoder follow the groups' speed."""
    target_wait_s: TargetWait = TargetWait()
    cluster_grows: bool = False
    """With `by: work`: Ray's own autoscaler adds hosts, so replicas are asked for that do not fit now."""
    poll_s: PositiveFloat = 5
    """With `by: work`: seconds between two looks at the queue. After three that failed nothing changes."""
    min_replicas: NonNegativeInt = 1
    """Smallest number of replicas. With 0 the first job waits until one has started and loaded."""
    max_replicas: PositiveInt = 1
    """Largest number of replicas."""
    target_queue_length: PositiveFloat = 2
    """Requests per replica, running and waiting, that the autoscaler aims at."""
    upscale_delay_s: NonNegativeFloat = 10
    """Seconds for which more replicas have to be needed before they are started."""
    downscale_delay_s: NonNegativeFloat = 300
    """Seconds for which fewer replicas have to suffice before one is stopped."""
    look_back_s: float = Field(20, gt=10)
    """Seconds over which the queue length is averaged; Ray counts every 10 seconds."""

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
    """Largest number of requests of a batch."""
    wait_s: NonNegativeFloat = 0.0
    """Seconds that the first request of a batch waits for others."""


class Stage(Section):
    """The options that the three stages have in common."""

    device: Device = "auto"
    """Device of the stage. `auto` is CUDA if there is a GPU, else the CPU."""
    memory_fraction: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory that each process of the stage may take. The shares of processes on one GPU, with
    `num_gpus` below 1, may add up to at most 1; 0.9 leaves memory for what allocators do not count, e.g. CUDA
    contexts."""
    threads: int = Field(0, ge=0)
    """CPU threads of the math in one process. 0 is all cores, shared among the ranks of a group."""
    autoscaling: Autoscaling = Autoscaling()
    max_ongoing_requests: PositiveInt = 64
    """Requests that a replica takes at once; further ones wait for it."""
    warmup: bool = True
    """Run the stage once before a replica reports ready, so that its first request is not slow."""
    health_check_period_s: PositiveFloat = 5
    """Seconds between two health checks of a replica."""
    health_check_timeout_s: PositiveFloat = 10
    """Seconds without an answer after which a health check has failed."""


class EncoderConfig(Stage):
    """The text encoder."""

    resources: Resources = Resources(num_cpus=1, num_gpus=1)
    batch: Batch = Batch(size=8, wait_s=0.02)


class ParallelConfig(Section):
    """The ways in which the ranks of a group share a step. Their product is the number of ranks.

    With `ranks` alone the group picks these three by the memory of its devices, and logs its choice and the reason.
    """

    tensor: PositiveInt = 1
    """Ranks that share every layer's weights. Must divide the attention heads and the feed-forward width."""
    guidance: Literal[1, 2] = 1
    """With 2, each half of classifier-free guidance has ranks of its own."""
    sequence: PositiveInt = 1
    """Ranks that share the tokens of a sample. Must divide the heads that tensor parallelism leaves a rank."""
    ranks: PositiveInt | None = None
    """Number of ranks, instead of the three sizes above."""

    @model_validator(mode="after")
    def _either(self) -> ParallelConfig:
        given = {"tensor", "guidance", "sequence"} & self.model_fields_set
        if self.ranks is not None and given:
            raise ValueError(f"ranks is {self.ranks} and {min(given)} is given as well, expected one or the other")
        return self

    @property
    def size(self) -> int:
        """Number of ranks of a group."""
        return self.ranks or self.guidance * self.sequence * self.tensor


class DenoiserConfig(Stage):
    """The groups of ranks that denoise."""

    parallel: ParallelConfig = ParallelConfig()
    rank: Resources = Resources(num_cpus=1, num_gpus=1)
    coordinator_cpus: NonNegativeFloat = 1
    """CPUs that Ray reserves for the coordinator of a group."""
    placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    """Ray placement strategy of a group. STRICT_PACK keeps its ranks on one host, where links are fast."""
    batch: Batch = Batch(size=4, wait_s=0.005)
    """Batch of admissions: samples that arrive together start together."""
    experts: Literal["together", "swap", "split"] = "together"
    """`together`: every rank holds both experts. `swap`: both are in host memory, and the one in use on the device as
    well. `split`: two deployments have one expert each, and samples move between them at the boundary."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """For devices smaller than an expert, with `experts` `swap` or `split`: place of the blocks that do not stay on the
    device. `cpu`: pinned host memory. `disk`: the files of `model.sharded`; host memory then holds two blocks."""
    resident_blocks: int | None = Field(None, ge=0)
    """With `offload`, number of blocks that stay on the device; two more pass through it. None is as many as leave
    memory for the largest request that `limits` allow."""
    low_noise_autoscaling: Autoscaling | None = None
    """With `experts: split`, autoscaling of the low-noise expert's replicas; `autoscaling` then holds for the
    high-noise ones. If this is not given, `autoscaling` holds for both."""
    samples_per_step: PositiveInt = 1
    """Number of samples of equal shape that may share a forward pass."""
    tokens_per_step: PositiveInt = 80_000
    """Number of tokens of a shared forward pass; a single sample may exceed it."""
    step_memory_mib: NonNegativeFloat = 0
    """Working memory of a shared forward pass on one rank; a single sample may exceed it. 0 is no limit."""
    resident_samples: PositiveInt = 8
    """Number of samples whose state a group holds at once; others wait in the admission queue."""
    parked_memory_mib: NonNegativeFloat = 4096
    """Device memory for the state of samples that do not take part in a step. Beyond it, the least urgent ones are kept
    in host memory."""
    text_cache_mib: NonNegativeFloat = 1024
    """Size of the text K/V cache of each expert on a rank: device memory for the keys and values of the texts in the
    last forward pass, which the next one uses again if the same samples step. For a larger batch they are computed at
    every step."""
    attention: Literal["auto", "flash4", "flash3", "cudnn", "flash", "native"] = "auto"
    """Attention kernel. `auto` is the fastest one that works on the ranks' device; the log says which and why."""
    symmetric_memory: bool = True
    """Lets tensor-parallel ranks exchange results by copies between their devices (symmetric memory), if NVLink
    joins them and a trial at the start succeeds; otherwise by NCCL. The log says which and why."""
    compile: bool = False
    """Compile the experts' blocks at the start, for GPUs. Results then differ from those without by rounding."""
    checkpoint_s: NonNegativeFloat = 30
    """Seconds of denoising after which a sample is saved again, so that another group can continue it if this one is
    lost. 0 is never."""
    profile: str = ""
    """Folder on the ranks' hosts, by its absolute path, for profiles of the kernels in each step; empty is none. It
    shows what makes steps slow; writing a profile costs a moment between steps."""
    fuse_guidance_tokens: int = Field(8192, ge=0)
    """Number of tokens up to which both halves of guidance run as one forward pass."""
    step_timeout_s: PositiveFloat = 600
    """Seconds after which a step counts as hung, and the group is replaced."""
    start_timeout_s: PositiveFloat = 1800
    """Seconds for the ranks to start and load."""
    shutdown_timeout_s: PositiveFloat = 3600
    """Seconds for which a replica that is scaled down or replaced may finish its samples; at least the longest job."""

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
    """GPUs of one replica. Each has a copy of the VAE, and they share the decoding of every picture. With a share of a
    GPU in `resources`, they are the GPUs of its host from that one on; `memory_fraction` must be free on all of
    them."""
    tile_memory_mib: NonNegativeFloat = 0
    """Working memory of a decode on each device, beside the weights: pictures are cut into tiles that fit. 0 is all
    that is free on a GPU, and no limit on CPUs."""
    batch: Batch = Batch(size=1, wait_s=0.0)
    """Batch of videos. One video fills a device, and alone its pixels are the same every time; others in the batch
    change the last bits."""
    store_wait_s: NonNegativeFloat = 3600
    """Seconds for which a finished sample is kept in memory while the storage does not accept its video."""

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
    """CPUs that Ray reserves for one process."""
    max_ongoing_requests: PositiveInt = 256
    """Requests that a replica takes at once; further ones wait for it."""

    @model_validator(mode="after")
    def _always_there(self) -> PipelineConfig:
        if self.autoscaling.by != "requests" or self.autoscaling.min_replicas < 1:
            raise ValueError("autoscaling has by 'work' or min_replicas 0, expected by 'requests' and at least 1")
        return self
