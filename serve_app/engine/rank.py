"""A rank: one process with one shard of both experts. Does what its group's coordinator says, one call at a time.

Torch is imported where it is used: the coordinator imports this module for the actor class alone.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from serve_app.compute import pick_device, set_threads
from serve_app.config import Config
from serve_app.request import Params

if TYPE_CHECKING:
    import numpy as np

    from serve_app.wan.sample import Sample


@dataclass(frozen=True)
class Admitted:
    """What the scheduler needs of a new sample: its token count and the first step of the low-noise expert."""

    tokens: int
    boundary: int


@dataclass(frozen=True)
class Stepped:
    """A step is done: its seconds, and for samples that did not survive it, why."""

    seconds: float
    failed: dict[str, str]


@dataclass(frozen=True)
class RankStatus:
    """Where a rank runs, and for how many seconds its present call has been running (None: it is idle)."""

    node_id: str
    pid: int
    busy_s: float | None


class Rank:
    """What the actor does. Calls run one after the other in one thread, except `status`: it has a thread of its own, so
    that a health check is never queued behind a step.

    Args:
        config: the deployment's configuration.
        rank: index in the group, from 0.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._busy_since: float | None = None
        self._samples: dict[str, Sample] = {}
        self._models: dict[str, Any] = {}

    def rendezvous(self) -> tuple[str, int]:
        """An address and a free port on this host at which the group's ranks can meet."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def load(self, address: str, port: int) -> dict[str, float]:
        """Join the group and load this rank's shard of both experts.

        Returns:
            `seconds` it took and `peak_rss_mib` of the process.

        Raises:
            ConfigError: the tensor-parallel size does not fit the model.
            CheckpointError: the folder is not a complete model.
        """
        import resource

        import torch

        from serve_app.wan.checkpoint import Checkpoint
        from serve_app.wan.parallel import init_world, load_expert

        started = time.monotonic()
        stage = self._config.denoiser
        set_threads(stage.threads or max(1, (os.cpu_count() or 1) // stage.tensor_parallel))
        device = pick_device(stage.device)
        world = init_world(self._rank, stage.tensor_parallel, address, port, device, timeout_s=stage.start_timeout_s)
        self._device = device
        self._dtype = getattr(torch, self._config.model.dtype)
        self._checkpoint = Checkpoint(self._config.model.folder)
        for expert in self._checkpoint.experts:
            self._models[expert] = load_expert(self._checkpoint, expert, world, self._dtype, device)
        return {
            "seconds": time.monotonic() - started,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    def warm_up(self, params: Params) -> None:
        """Run one step of each expert at the size of `params`, so that no request pays for first-time work."""
        import torch

        from serve_app.wan.sampler import advance
        from serve_app.wan.text import Embedding

        text_dim = self._checkpoint.expert_config("transformer")["text_dim"]
        empty = Embedding(torch.zeros(1, text_dim), tokens=1, truncated=False)
        for model in self._models.values():
            sample = self._start(params, empty, empty if params.guided else None, "warm-up")
            advance(model, [sample], self._config.denoiser.fuse_guidance_tokens)

    def admit(self, sample_id: str, params: Params, positive: np.ndarray, negative: np.ndarray | None) -> Admitted:
        """Take in a sample at step 0.

        Args:
            positive: embedding of the prompt, [tokens, dim]; `negative` of the negative prompt, None without guidance.
        """
        import torch

        from serve_app.wan.text import Embedding

        def embedding(array: np.ndarray) -> Embedding:
            # The array lies in Ray's read-only shared memory; torch wants memory of its own.
            return Embedding(torch.tensor(array), tokens=len(array), truncated=False)

        sample = self._start(params, embedding(positive), None if negative is None else embedding(negative), sample_id)
        self._samples[sample_id] = sample
        return Admitted(tokens=sample.tokens, boundary=sample.boundary_step)

    def step(self, sample_ids: list[str]) -> Stepped:
        """Advance these samples, all of one cohort, by one step."""
        from serve_app.wan.sampler import NotFinite, advance

        started = self._busy_since = time.monotonic()
        failed: dict[str, str] = {}
        try:
            samples = [self._samples[sample_id] for sample_id in sample_ids]
            advance(self._models[samples[0].expert], samples, self._config.denoiser.fuse_guidance_tokens)
        except NotFinite as error:  # the other samples of the batch have made their step
            failed = {sample.name: str(error) for sample in error.samples}
        finally:
            self._busy_since = None
        return Stepped(seconds=time.monotonic() - started, failed=failed)

    def latents(self, sample_id: str) -> np.ndarray:
        """A sample's latents, float32 [1, channels, frames, height, width]."""
        return self._samples[sample_id].latents.float().cpu().numpy()

    def drop(self, sample_ids: list[str]) -> None:
        """Forget samples and free their memory."""
        for sample_id in sample_ids:
            self._samples.pop(sample_id, None)

    @ray.method(concurrency_group="health")
    def status(self) -> RankStatus:
        """Answered at once, also during a step."""
        since = self._busy_since
        return RankStatus(
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            busy_s=None if since is None else time.monotonic() - since,
        )

    def _start(self, params: Params, positive: Any, negative: Any, name: str) -> Sample:
        from serve_app.wan.sample import Sample

        return Sample.start(params, self._checkpoint, positive, negative, self._device, self._dtype, name)


RankActor: Any = ray.remote(concurrency_groups={"health": 1})(Rank)
