"""A rank: one process with one shard of the experts. Does what its group's coordinator says, one call at a time.

Torch is imported where it is used: the coordinator imports this module for the actor class alone.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import ray

from serve_app.compute import (
    SEE_ALL_GPUS,
    is_out_of_memory,
    limit_memory,
    pick_device,
    see_own_first,
    set_threads,
    settle,
)
from serve_app.config import Config
from serve_app.engine.messages import Admitted, DeviceBroken, OutOfMemory, RankStatus, Survey
from serve_app.engine.profile import StepProfile
from serve_app.errors import StateError, one_line
from serve_app.logs import get_logger
from serve_app.request import Params
from serve_app.wan.parallel.mesh import Mesh

if TYPE_CHECKING:
    import numpy as np

    from serve_app.wan.sampling.sample import Sample
    from serve_app.wan.transformer.experts import Experts
    from serve_app.wan.weights.checkpoint import Expert

logger = get_logger(__name__)


class Rank:
    """What the actor does. Calls run one after the other in one thread, except `status`: it has a thread of its own, so
    that a health check is never queued behind a step.

    Args:
        config: the deployment's configuration.
        rank: index in the group, from 0.
        experts: which ones to load; None is all that the checkpoint has.
    """

    def __init__(self, config: Config, rank: int, experts: tuple[Expert, ...] | None = None) -> None:
        self._config = config
        self._rank = rank
        self._wanted = experts
        self._busy_since: float | None = None
        self._samples: dict[str, Sample] = {}
        self._experts: Experts | None = None
        self._profile: StepProfile | None = None
        if SEE_ALL_GPUS.keys() <= os.environ.keys():
            context = ray.get_runtime_context()
            (here,) = (node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
            see_own_first(context.get_accelerator_ids().get("GPU", []), int(here["Resources"].get("GPU", 0)))

    def rendezvous(self) -> tuple[str, int]:
        """An address and a free port on this host at which the group's ranks can meet."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def survey(self) -> Survey:
        """Look at the model and the device, without loading anything.

        Raises:
            CheckpointError: the folder is not a complete model.
        """
        import psutil

        from serve_app.engine.memory_budget import MemoryBudget
        from serve_app.wan.weights.checkpoint import Checkpoint

        stage, checkpoint = self._config.denoiser, Checkpoint(self._config.model.folder)
        experts = self._wanted or checkpoint.experts
        # Blocks that pass through leave as much room as there is.
        size, passing = stage.parallel.size, stage.offload != "none"
        held = {
            tensor: 0.0
            if passing
            else MemoryBudget(self._config, checkpoint, experts, Mesh(tensor=tensor)).weight_bytes
            for tensor in range(1, size + 1)
            if size % tensor == 0
        }
        device = pick_device(stage.device)
        if device.type == "cuda":
            memory = limit_memory(device, stage.memory_fraction)
        else:  # the host's, which the ranks on it share
            memory = stage.memory_fraction * psutil.virtual_memory().total / size
        return Survey(checkpoint.expert_config(experts[0]), held, memory)

    def load(self, address: str, port: int, mesh: Mesh) -> dict[str, float]:
        """Join the group and load this rank's shard of the experts.

        Returns:
            `seconds` it took and `peak_rss_mib` of the process.

        Raises:
            ConfigError: the mesh does not fit the model, or the model not the device.
            CheckpointError: the folder is not a complete model, or the prepared one does not fit or is damaged.
        """
        import resource

        import torch

        from serve_app.engine.memory_budget import MemoryBudget
        from serve_app.engine.saver import Saver
        from serve_app.model import departures
        from serve_app.storage import Storage
        from serve_app.wan.parallel.process_groups import init_process_groups
        from serve_app.wan.transformer.experts import Experts
        from serve_app.wan.transformer.load import load_expert
        from serve_app.wan.weights.checkpoint import Checkpoint
        from serve_app.wan.weights.sharded import ShardedCheckpoint

        started = time.monotonic()
        stage = self._config.denoiser
        # The ranks of a group compute at the same moments: with all cores each, those on one host would wait for one
        # another at every operation.
        shared = 1 if stage.placement.endswith("SPREAD") else mesh.ranks
        set_threads(stage.threads or max(1, (os.cpu_count() or 1) // shared))
        self._device = pick_device(stage.device)
        self._mesh = mesh
        self._world = world = init_process_groups(
            self._rank, mesh, address, port, self._device, stage.start_timeout_s, stage.symmetric_memory
        )
        self._dtype = getattr(torch, self._config.model.dtype)
        self._checkpoint = Checkpoint(self._config.model.folder, self._config.model.random)
        if self._rank == 0:
            for line in departures(self._config, self._checkpoint):
                logger.info(line)
        limit = limit_memory(self._device, stage.memory_fraction)
        model, sharded = self._config.model, None
        if model.sharded_folder is not None:
            sharded = ShardedCheckpoint(model.sharded_folder, self._checkpoint, world.tensor.size, model.dtype)
        names = self._wanted or self._checkpoint.experts
        slots = MemoryBudget(self._config, self._checkpoint, names, mesh).slots(limit, self._device)
        experts = Experts(
            names,
            lambda name: load_expert(
                self._checkpoint,
                name,
                world,
                self._dtype,
                self._device,
                stage.text_cache_mib * 2**20,
                stage.attention,
                stage.compile,
                sharded,
                slots,
            ),
            slots,
        )
        self._experts = experts
        self._profile = StepProfile(stage.profile, self._rank, self._device.type) if stage.profile else None
        # All ranks hold the same samples, so one of them saves.
        self._saver = Saver(Storage(self._config.storage_options)) if self._rank == 0 and stage.checkpoint_s else None
        return {
            "seconds": time.monotonic() - started,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }

    def warm_up(self, params: Params) -> None:
        """Run one step of each expert at the size of `params`, so that no request pays for first-time work."""
        from serve_app.wan.sampling.warm_up import warm_up

        assert self._experts is not None
        stage = self._config.denoiser
        for name in self._experts.names:
            warm_up(
                self._experts.use(name),
                self._checkpoint,
                params,
                stage.samples_per_step,
                stage.fuse_guidance_tokens,
                self._dtype,
                stage.compile,
            )
        settle()

    def admit(
        self,
        sample_id: str,
        params: Params,
        positive: np.ndarray,
        negative: np.ndarray | None,
        state: bytes | None = None,
    ) -> Admitted:
        """Take in a sample.

        Args:
            positive: embedding of the prompt, [tokens, dim]; `negative` of the negative prompt, None without guidance.
            state: where to go on, as `save` returned it. One that cannot be used is said, and the sample begins anew.
        """
        import torch

        from serve_app.wan.cost import activation_bytes, step_flops
        from serve_app.wan.text import Embedding

        def embedding(array: np.ndarray) -> Embedding:
            # The array lies in Ray's read-only shared memory; torch wants memory of its own.
            return Embedding(torch.tensor(array), tokens=len(array), truncated=False)

        sample, refused = None, None
        if state is not None:
            try:
                sample = self._continue(state, params, sample_id)
            except StateError as error:
                refused = str(error)
        if sample is None:
            sample = self._start(
                params, embedding(positive), None if negative is None else embedding(negative), sample_id
            )
        self._samples[sample_id] = sample
        config = self._checkpoint.expert_config("transformer")
        return Admitted(
            tokens=sample.tokens,
            step=sample.step,
            steps=sample.steps,
            boundary=sample.boundary_step,
            work=step_flops(config, sample.tokens, sample.guided),
            step_mib=activation_bytes(
                config, sample.tokens, self._dtype.itemsize, self._mesh, self._config.denoiser.compile
            )
            / 2**20,
            state_mib=sample.state_bytes / 2**20,
            refused=refused,
        )

    @ray.method(enable_task_events=False)  # work beside every step, to say what `describe` counts anyway
    def step(self, order: list[Any]) -> list[Any]:
        """Advance some samples, all of one cohort, by one step.

        Args:
            order: the fields of a `StepRequest`. Plain lists and mappings, because pickling classes to and fro was a
                tenth of what is added to every step.

        Returns:
            The fields of a `StepResult`.

        Raises:
            OutOfMemory: the step did not fit; nothing has changed.
            DeviceBroken: this process is of no use any more.
        """
        advancing, parked, saved = order
        with self._profiled(self._samples[advancing[0]]):
            seconds, failed = self._advance(advancing, parked)
        for sample_id, prefix in saved.items():
            if self._saver is not None and sample_id not in failed:
                frozen = self._samples[sample_id].snapshot()
                self._saver.save(prefix, frozen.step, functools.partial(self._bytes, frozen))
        return [seconds, failed]

    def _advance(self, advancing: list[str], parked: list[str]) -> tuple[float, dict[str, str]]:
        """The seconds that the step took, and for samples that did not survive it, why."""
        import torch

        from serve_app.wan.parallel.symmetric_memory import OutOfStep
        from serve_app.wan.sampling.sampler import NotFinite, advance

        assert self._experts is not None
        started, before = time.monotonic(), self._world.exchanged
        self._busy_since = started
        failed: dict[str, str] = {}
        try:
            for sample_id in parked:
                self._move(sample_id, torch.device("cpu"))
            samples = [self._move(sample_id, self._device) for sample_id in advancing]
            advance(self._experts.use(samples[0].expert), samples, self._config.denoiser.fuse_guidance_tokens)
        except NotFinite as error:  # the other samples of the batch have made their step
            failed = {sample.name: error.message_for(sample) for sample in error.samples}
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) and not isinstance(error, OutOfStep):
                self._experts.forget_texts()
                raise OutOfMemory(one_line(error), self._world.exchanged - before) from None
            # A failed assertion or access in a kernel: every later call fails alike.
            if isinstance(error, OutOfStep) or "CUDA error" in str(error) or "CUDA driver error" in str(error):
                raise DeviceBroken(one_line(error)) from None
            raise
        finally:
            self._busy_since = None
        return time.monotonic() - started, failed

    def save(self, sample_id: str) -> bytes:
        """A sample's state, for another group to continue."""
        return self._bytes(self._samples[sample_id])

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
        import psutil

        since, device_mib, retries = self._busy_since, 0.0, 0
        if self._experts is not None and self._device.type == "cuda":
            import torch

            memory = torch.cuda.memory_stats_as_nested_dict(self._device)
            device_mib = memory["allocated_bytes"]["all"]["current"] / 2**20
            retries = memory["num_alloc_retries"]
        return RankStatus(
            node_id=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            busy_s=None if since is None else time.monotonic() - since,
            samples=len(self._samples),
            rss_mib=psutil.Process().memory_info().rss / 2**20,
            device_mib=device_mib,
            retries=retries,
            weights_mib=0.0 if self._experts is None else self._experts.device_bytes / 2**20,
        )

    def _start(self, params: Params, positive: Any, negative: Any, name: str) -> Sample:
        from serve_app.wan.sampling.sample import Sample

        return Sample.start(params, self._checkpoint, positive, negative, self._device, self._dtype, name)

    def _continue(self, state: bytes, params: Params, name: str) -> Sample:
        from serve_app.wan.sampling.snapshot import from_bytes

        sample = from_bytes(state, self._checkpoint, self._device, self._dtype)
        if sample.params != params:
            raise StateError("saved sample: belongs to another request")
        sample.name = name
        return sample

    def _bytes(self, sample: Sample) -> bytes:
        from serve_app.wan.sampling.snapshot import to_bytes

        return to_bytes(sample, self._checkpoint.revision)

    def _profiled(self, sample: Sample) -> AbstractContextManager[None]:
        return nullcontext() if self._profile is None else self._profile.step(sample.name, sample.step + 1)

    def _move(self, sample_id: str, device: Any) -> Sample:
        sample = self._samples[sample_id]
        if sample.latents.device.type != device.type:
            sample.to(device)
        return sample


RankActor: Any = ray.remote(concurrency_groups={"health": 1})(Rank)
