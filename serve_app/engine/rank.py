"""A rank: one process with one shard of the experts. Does what its group's coordinator says, one call at a time.

Imports torch where it is used: the coordinator imports this module for the actor class alone.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import ray

from serve_app.compute import SEE_ALL_GPUS, is_out_of_memory, see_own_first
from serve_app.config import Config
from serve_app.device_memory import DeviceMemory
from serve_app.engine.errors import DeviceBroken, OutOfMemory
from serve_app.engine.messages import Admitted, Loaded, RankStatus, StepRequest, StepResult, Survey
from serve_app.engine.pressure import TENTH
from serve_app.engine.profile import StepProfile
from serve_app.engine.rank_model import RankModel, survey
from serve_app.errors import StateError, one_line
from serve_app.request import Params
from serve_app.wan.parallel.mesh import Mesh

if TYPE_CHECKING:
    import numpy as np

    from serve_app.engine.saver import Saver
    from serve_app.wan.sampling.sample import Sample
    from serve_app.wan.weights.checkpoint import Expert


class Rank:
    """The actor of a rank.

    Calls run one after the other in one thread, except `status`: it has a thread of its own, so that a health check
    never waits behind a step.

    Args:
        config: the deployment's configuration.
        rank: index in the group, from 0.
        experts: which experts to load; None is all that the checkpoint has.
    """

    def __init__(self, config: Config, rank: int, experts: tuple[Expert, ...] | None = None) -> None:
        self._config = config
        self._rank = rank
        self._experts = experts
        self._loaded: RankModel | None = None
        self._busy_since: float | None = None
        self._samples: dict[str, Sample] = {}
        self._parts: dict[str, float] = {}
        """Components of the memory after the latest step: `status` may not look at what a step changes."""
        self._profile: StepProfile | None = None
        self._saver: Saver | None = None
        if SEE_ALL_GPUS.keys() <= os.environ.keys():
            context = ray.get_runtime_context()
            (here,) = (node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
            see_own_first(context.get_accelerator_ids().get("GPU", []), int(here["Resources"].get("GPU", 0)))

    @property
    def model(self) -> RankModel:
        """The rank's share of the model, once `load` has returned."""
        assert self._loaded is not None, "nothing is loaded yet"
        return self._loaded

    def rendezvous(self) -> tuple[str, int]:
        """Return an address and a free port on this host at which the group's ranks can meet."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def survey(self) -> Survey:
        """Look at the model and the device, without loading anything; see `rank_model.survey`."""
        return survey(self._config, self._experts)

    def load(self, address: str, port: int, mesh: Mesh) -> Loaded:
        """Join the group and load this rank's shard of the experts; see `RankModel.load`."""
        import resource

        from serve_app.engine.saver import Saver
        from serve_app.storage import Storage

        started = time.monotonic()
        stage = self._config.denoiser
        self._loaded = RankModel.load(self._config, self._rank, self._experts, address, port, mesh)
        self._parts = self._loaded.parts(())
        if stage.profile:
            self._profile = StepProfile(stage.profile, self._rank, self._loaded.device.type)
        # All ranks hold the same samples, so one of them saves.
        if self._rank == 0 and stage.checkpoint_s:
            self._saver = Saver(Storage(self._config.storage_options))
        return Loaded(time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    def warm_up(self, params: Params) -> None:
        """Run one step of each expert at the size of `params`, so that no request pays for first-time work."""
        self.model.warm_up(self._config, params)

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
            sample_id: its name in later calls.
            params: all that determines its pixels.
            positive: embedding of the prompt, [tokens, dim].
            negative: embedding of the negative prompt, [tokens, dim]; None without guidance.
            state: where to go on, as `save` returned it. If it cannot be used, the answer says why and the
                sample begins anew.
        """
        from serve_app.wan.cost import activation_bytes, step_flops

        sample, refused = None, None
        if state is not None:
            try:
                sample = self._restored(state, params, sample_id)
            except StateError as error:
                refused = str(error)
        if sample is None:
            sample = self._started(params, positive, negative, sample_id)
        self._samples[sample_id] = sample
        model = self.model
        config = model.checkpoint.expert_config("transformer")
        step_bytes = activation_bytes(
            config, sample.tokens, model.dtype.itemsize, model.mesh, self._config.denoiser.compile
        )
        return Admitted(
            tokens=sample.tokens,
            step=sample.step,
            steps=sample.steps,
            boundary=sample.boundary_step,
            work=step_flops(config, sample.tokens, sample.guided),
            step_mib=step_bytes / 2**20,
            state_mib=sample.state_bytes / 2**20,
            refused=refused,
        )

    @ray.method(enable_task_events=False)  # work beside every step, to say what `describe` counts anyway
    def step(self, wire: list[Any]) -> list[Any]:
        """Advance some samples, all of one cohort, by one step.

        Args:
            wire: a `StepRequest`.

        Returns:
            A `StepResult`, as `to_wire` makes it.

        Raises:
            OutOfMemory: the step did not fit; nothing has changed.
            DeviceBroken: this process is of no use any more.
        """
        request = StepRequest.from_wire(wire)
        with self._profiled(self._samples[request.advance[0]]):
            result = self._advance(request)
        for sample_id, prefix in request.save.items():
            if self._saver is not None and sample_id not in result.failed:
                frozen = self._samples[sample_id].snapshot()
                self._saver.save(prefix, frozen.step, functools.partial(self._bytes, frozen))
        return result.to_wire()

    def _advance(self, request: StepRequest) -> StepResult:
        import torch

        from serve_app.wan.sampling.sampler import NotFinite, advance

        model = self.model
        started, before = time.monotonic(), model.groups.exchanged
        self._busy_since = started
        failed: dict[str, str] = {}
        try:
            for sample_id in request.park:
                self._move(sample_id, torch.device("cpu"))
            samples = [self._move(sample_id, model.device) for sample_id in request.advance]
            advance(model.experts.use(samples[0].expert), samples, self._config.denoiser.fuse_guidance_tokens)
        except NotFinite as error:  # the other samples of the batch have made their step
            failed = {sample.name: error.message_for(sample) for sample in error.samples}
        except (RuntimeError, MemoryError) as error:
            translated = _translate(error, model.groups.exchanged - before)
            if translated is None:
                raise
            if isinstance(translated, OutOfMemory):
                model.experts.forget_texts()
            raise translated from None
        finally:
            self._busy_since = None
        seconds = time.monotonic() - started
        self._parts = model.parts(self._samples.values())
        memory = model.memory(self._parts, anew=True)
        return StepResult(seconds, failed, memory.headroom, memory.largest if memory.headroom < TENTH else "")

    def save(self, sample_id: str) -> bytes:
        """Return a sample's state, from which another group can continue it."""
        return self._bytes(self._samples[sample_id])

    def latents(self, sample_id: str) -> np.ndarray:
        """Return a sample's latents, float32 [1, channels, frames, height, width]."""
        return self._samples[sample_id].latents.float().cpu().numpy()

    def drop(self, sample_ids: list[str]) -> None:
        """Forget samples and free their memory."""
        for sample_id in sample_ids:
            self._samples.pop(sample_id, None)

    @ray.method(concurrency_group="health")
    def status(self) -> RankStatus:
        """Return the rank's status at once, also during a step."""
        import psutil

        since, loaded, device_mib, retries = self._busy_since, self._loaded, 0.0, 0
        if loaded is not None and loaded.device.type == "cuda":
            import torch

            memory = torch.cuda.memory_stats_as_nested_dict(loaded.device)
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
            weights_mib=0.0 if loaded is None else loaded.weights / 2**20,
            memory=DeviceMemory() if loaded is None else loaded.memory(self._parts),
        )

    def _started(self, params: Params, positive: np.ndarray, negative: np.ndarray | None, name: str) -> Sample:
        import torch

        from serve_app.wan.sampling.sample import Sample
        from serve_app.wan.text import Embedding

        def embedding(array: np.ndarray) -> Embedding:
            # The array lies in Ray's read-only shared memory; torch wants memory of its own.
            return Embedding(torch.tensor(array), tokens=len(array), truncated=False)

        model = self.model
        unconditional = None if negative is None else embedding(negative)
        return Sample.start(
            params, model.checkpoint, embedding(positive), unconditional, model.device, model.dtype, name
        )

    def _restored(self, state: bytes, params: Params, name: str) -> Sample:
        from serve_app.wan.sampling.snapshot import from_bytes

        sample = from_bytes(state, self.model.checkpoint, self.model.device, self.model.dtype)
        if sample.params != params:
            raise StateError("saved sample: belongs to another request")
        sample.name = name
        return sample

    def _bytes(self, sample: Sample) -> bytes:
        from serve_app.wan.sampling.snapshot import to_bytes

        return to_bytes(sample, self.model.checkpoint.revision)

    def _profiled(self, sample: Sample) -> AbstractContextManager[None]:
        return nullcontext() if self._profile is None else self._profile.step(sample.name, sample.step + 1)

    def _move(self, sample_id: str, device: Any) -> Sample:
        sample = self._samples[sample_id]
        if sample.latents.device.type != device.type:
            sample.to(device)
        return sample


def _translate(error: RuntimeError | MemoryError, exchanged: int) -> OutOfMemory | DeviceBroken | None:
    """Return what an error of a step means for the group; None if it concerns samples only.

    Args:
        error: as torch raised it.
        exchanged: how many messages between ranks the step had begun.
    """
    from serve_app.wan.parallel.symmetric_memory import OutOfStep

    if isinstance(error, OutOfStep):
        return DeviceBroken(one_line(error))
    if is_out_of_memory(error):
        return OutOfMemory(one_line(error), exchanged)
    # A failed assertion or access in a kernel: every later call fails alike.
    if "CUDA error" in str(error) or "CUDA driver error" in str(error):
        return DeviceBroken(one_line(error))
    return None


RankActor: Any = ray.remote(concurrency_groups={"health": 1})(Rank)
