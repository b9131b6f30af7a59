"""A rank's share of the model: its device, its process groups, and its shard of the experts.

Imports torch where it is used, as `rank` does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serve_app.compute import limit_memory, pick_device, set_threads, settle
from serve_app.config import Config
from serve_app.device_memory import DeviceMemory, host_limit, measure
from serve_app.engine.messages import Survey
from serve_app.logs import get_logger
from serve_app.planning.memory import Size
from serve_app.wan.parallel.mesh import Mesh

if TYPE_CHECKING:
    import torch

    from serve_app.request import Params
    from serve_app.wan.parallel.process_groups import ProcessGroups
    from serve_app.wan.sampling.sample import Sample
    from serve_app.wan.transformer.experts import Experts
    from serve_app.wan.weights.checkpoint import Checkpoint, Expert

logger = get_logger(__name__)


def survey(config: Config, experts: tuple[Expert, ...] | None) -> Survey:
    """Look at the model and the device, without loading anything.

    Args:
        config: the deployment's configuration.
        experts: which experts the rank would hold; None is all that the checkpoint has.

    Raises:
        CheckpointError: the folder is not a complete model.
    """
    import psutil

    from serve_app.engine.memory_budget import MemoryBudget
    from serve_app.wan.weights.checkpoint import Checkpoint

    stage, checkpoint = config.denoiser, Checkpoint(config.model.folder)
    names = experts or checkpoint.experts
    size = stage.parallel.size
    weight_bytes = {
        # With offload the resident blocks are as many as the memory allows, whatever the mesh.
        tensor: 0.0
        if stage.offload != "none"
        else MemoryBudget(config, checkpoint, names, Mesh(tensor=tensor)).weight_bytes
        for tensor in range(1, size + 1)
        if size % tensor == 0
    }
    device = pick_device(stage.device)
    if device.type == "cuda":
        memory = limit_memory(device, stage.memory_fraction)
    else:  # the host's, which the ranks on it share
        memory = stage.memory_fraction * psutil.virtual_memory().total / size
    return Survey(checkpoint.expert_config(names[0]), weight_bytes, memory)


@dataclass(frozen=True)
class RankModel:
    """A rank's share of the model, loaded.

    Attributes:
        checkpoint: the model's folder.
        device: where the rank computes.
        dtype: the type it computes in.
        mesh: how the group's ranks share a step.
        groups: process groups with the other ranks.
        experts: this rank's shard of each expert.
        limit: bytes of the device that the rank may take.
        planned: bytes that the plan gives it there.
        weights: bytes of the experts on the device.
    """

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    mesh: Mesh
    groups: ProcessGroups
    experts: Experts
    limit: float
    planned: float
    weights: float

    @classmethod
    def load(
        cls, config: Config, rank: int, experts: tuple[Expert, ...] | None, address: str, port: int, mesh: Mesh
    ) -> RankModel:
        """Join the group and load this rank's shard of the experts.

        Args:
            config: the deployment's configuration.
            rank: index in the group, from 0.
            experts: which experts to load; None is all that the checkpoint has.
            address: host where the ranks meet.
            port: its port.
            mesh: how the ranks share a step.

        Raises:
            ConfigError: the mesh does not fit the model, or the model does not fit the device.
            CheckpointError: the folder is not a complete model, or the sharded checkpoint does not fit or is damaged.
        """
        import torch

        from serve_app.engine.memory_budget import MemoryBudget
        from serve_app.model import departures
        from serve_app.wan.parallel.process_groups import init_process_groups
        from serve_app.wan.transformer.experts import Experts
        from serve_app.wan.transformer.load import load_expert
        from serve_app.wan.weights.checkpoint import Checkpoint
        from serve_app.wan.weights.sharded import ShardedCheckpoint

        stage, model = config.denoiser, config.model
        # The ranks of a group compute at the same moments: with all cores each, those on one host would wait for one
        # another at every operation.
        sharing = 1 if stage.placement.endswith("SPREAD") else mesh.ranks
        set_threads(stage.threads or max(1, (os.cpu_count() or 1) // sharing))
        device = pick_device(stage.device)
        groups = init_process_groups(rank, mesh, address, port, device, stage.start_timeout_s, stage.symmetric_memory)
        dtype = getattr(torch, model.dtype)
        checkpoint = Checkpoint(model.folder, model.random)
        if rank == 0:
            for line in departures(config, checkpoint):
                logger.info(line)
        limit = limit_memory(device, stage.memory_fraction)
        sharded = None
        if model.sharded_folder is not None:
            sharded = ShardedCheckpoint(model.sharded_folder, checkpoint, groups.tensor.size, model.dtype)
        names = experts or checkpoint.experts
        budget = MemoryBudget(config, checkpoint, names, mesh)
        block_swap = budget.block_swap(limit, device)
        loaded = Experts(
            names,
            lambda name: load_expert(
                checkpoint,
                name,
                groups,
                dtype,
                device,
                stage.text_cache_mib * 2**20,
                stage.attention,
                stage.compile,
                sharded,
                block_swap,
            ),
            block_swap,
        )
        planned = budget.memory.need(Size.of(config.defaults), limit if math.isfinite(limit) else None).total
        if device.type != "cuda":
            limit = host_limit(stage.memory_fraction, sharing)
        return cls(checkpoint, device, dtype, mesh, groups, loaded, limit, planned, loaded.device_bytes)

    def parts(self, samples: Iterable[Sample]) -> dict[str, float]:
        """Return the bytes of the rank's components on its device. Not while a step is under way.

        Args:
            samples: those that the rank holds.
        """
        there = (one.state_bytes for one in samples if one.latents.device.type == self.device.type)
        return {"weights": self.weights, "texts": float(self.experts.text_bytes), "samples": float(sum(there))}

    def memory(self, parts: Mapping[str, float], anew: bool = False) -> DeviceMemory:
        """Measure the rank's memory on its device.

        Args:
            parts: its components.
            anew: whether the peak begins anew after this look.
        """
        from serve_app.wan.parallel import symmetric_memory

        group = self.groups.tensor.group
        shared = symmetric_memory.of(group.group_name) if group is not None else None
        found = measure(self.device, self.limit, parts, self.planned, anew)
        # Beside what the allocator counts, which lowers its limit by as much.
        return found if shared is None else replace(found, parts={**found.parts, "exchange": float(shared.held_bytes)})

    def warm_up(self, config: Config, params: Params) -> None:
        """Run one step of each expert at the size of `params`, so that no request pays for first-time work."""
        from serve_app.wan.sampling.warm_up import warm_up

        stage = config.denoiser
        for name in self.experts.names:
            warm_up(
                self.experts.use(name),
                self.checkpoint,
                params,
                stage.samples_per_step,
                stage.fuse_guidance_tokens,
                self.dtype,
                stage.compile,
            )
        settle()
