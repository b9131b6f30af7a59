"""The ranks of one denoiser replica, as their coordinator handles them: start, step, notice when one is gone."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve_app.compute import SEE_ALL_GPUS
from serve_app.config import Config
from serve_app.engine.answers import Answers
from serve_app.engine.errors import GroupLost
from serve_app.engine.messages import Admitted, Loaded, RankStatus, StepRequest, StepResult, Survey
from serve_app.engine.rank import RankActor
from serve_app.logs import get_logger
from serve_app.metrics import catalog as metrics
from serve_app.request import Params
from serve_app.wan.cost import work_bytes
from serve_app.wan.parallel.mesh import Mesh, default_mesh

if TYPE_CHECKING:
    from serve_app.wan.weights.checkpoint import Expert

logger = get_logger(__name__)


class Group:
    """A started group. Most methods call all ranks alike, in the same order: that keeps them in step.

    Args:
        ranks: the actors, by rank.
        config: the deployment's configuration.

    Attributes:
        mesh: how the ranks share a step.
    """

    def __init__(self, ranks: list[Any], config: Config) -> None:
        self.mesh = Mesh.of(config.denoiser.parallel) or Mesh()
        self._ranks = ranks
        self._config = config
        self._step_timeout_s = config.denoiser.step_timeout_s
        self._statuses: list[RankStatus] = []

    @classmethod
    async def start(
        cls,
        config: Config,
        placement_group: PlacementGroup,
        first_bundle: int,
        experts: tuple[Expert, ...] | None = None,
    ) -> Group:
        """Start one rank on each bundle from `first_bundle` on, load their shards and run each expert once.

        Args:
            config: the deployment's configuration.
            placement_group: where the ranks run.
            first_bundle: the bundle of rank 0.
            experts: which experts the ranks hold; None is all.

        Raises:
            GroupLost: a rank died or did not load within `denoiser.start_timeout_s`.
            ServeAppError: the configuration does not fit the model.
        """
        parallel, options = config.denoiser.parallel, rank_actor(config)
        ranks = [
            RankActor.options(
                **options,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group, placement_group_bundle_index=first_bundle + index
                ),
            ).remote(config, index, experts)
            for index in range(parallel.size)
        ]
        group = cls(ranks, config)
        timeout_s = config.denoiser.start_timeout_s
        started = time.monotonic()
        try:
            if Mesh.of(parallel) is None:
                group.mesh = await group._pick_mesh(timeout_s)
            address, port = await group._first("rendezvous", timeout_s=timeout_s)
            loaded: list[Loaded] = await group._all("load", address, port, group.mesh, timeout_s=timeout_s)
            group._statuses = await group._all("status", timeout_s=timeout_s)
            if config.denoiser.warmup:
                await group._all("warm_up", group.warm_up_params(), timeout_s=timeout_s)
        except BaseException:
            group.kill()
            raise
        logger.info(
            "group ready",
            extra={
                "ranks": len(ranks),
                "mesh": str(group.mesh),
                "seconds": round(time.monotonic() - started, 2),
                "load_seconds": [round(rank.seconds, 2) for rank in loaded],
                "peak_rss_mib": [round(rank.peak_rss_mib) for rank in loaded],
            },
        )
        return group

    async def _pick_mesh(self, timeout_s: float) -> Mesh:
        """Pick the mesh by the model and the device that rank 0 sees."""
        config = self._config
        seen: Survey = await self._first("survey", timeout_s=timeout_s)
        work = functools.partial(
            work_bytes, seen.shape, config.most_tokens, config.model.itemsize, compiled=config.denoiser.compile
        )
        mesh, why = default_mesh(
            config.denoiser.parallel.size, seen.shape, seen.weight_bytes.__getitem__, seen.device_bytes, work
        )
        logger.info("mesh picked", extra={"mesh": str(mesh), "reason": why})
        return mesh

    @property
    def statuses(self) -> list[RankStatus]:
        """The status of every rank as of the latest health check."""
        return list(self._statuses)

    def warm_up_params(self) -> Params:
        """Return the default request of this deployment."""
        return Params(**self._config.defaults.model_dump(), prompt="warm-up", seed=0)

    async def admit(
        self,
        sample_id: str,
        params: Params,
        positive: np.ndarray,
        negative: np.ndarray | None,
        state: bytes | None = None,
    ) -> Admitted:
        """Have every rank take in a sample. Arrays and states travel once per host, not once per rank."""
        shared = [None if one is None else ray.put(one) for one in (positive, negative, state)]
        return (await self._all("admit", sample_id, params, *shared))[0]

    async def step(self, request: StepRequest) -> StepResult:
        """Make one denoising step on all ranks.

        Raises:
            GroupLost: a rank died or the step exceeded `denoiser.step_timeout_s`.
            OutOfMemory: on every rank; nothing has changed.
            Exception: what the step raised on every rank; the group is still in step.
        """
        # Every rank has the same latents to the bit, so what one says of them holds for all. Memory is each one's own.
        first, *others = (StepResult.from_wire(one) for one in await self._all("step", request.to_wire()))
        fullest = min((first, *others), key=lambda one: one.headroom)
        return replace(first, headroom=fullest.headroom, largest=fullest.largest)

    async def save(self, sample_id: str) -> bytes:
        """Return a sample's state, from which another group can continue it."""
        state: bytes = await self._first("save", sample_id)
        return state

    async def latents(self, sample_id: str) -> np.ndarray:
        """Return a sample's latents, float32 [1, channels, frames, height, width]."""
        latents: np.ndarray = await self._first("latents", sample_id)
        return latents

    async def drop(self, sample_ids: list[str]) -> None:
        """Forget samples on every rank."""
        await self._all("drop", sample_ids)

    async def check_ranks(self, timeout_s: float) -> list[RankStatus]:
        """Return the status of every rank, in their order.

        Raises:
            GroupLost: a rank is dead, does not answer within `timeout_s`, or is stuck in a step.
        """
        self._statuses = await self._all("status", timeout_s=timeout_s)
        limit = self._step_timeout_s
        for index, status in enumerate(self._statuses):
            if status.busy_s is not None and status.busy_s > limit:
                raise GroupLost(f"rank {index} has been in one step for {status.busy_s:.0f} s, expected {limit:.0f} s")
            held = {"process": status.rss_mib, "tensors": status.device_mib, "weights": status.weights_mib}
            for component, mib in held.items():
                metrics.rank_memory_bytes.set(mib * 2**20, rank=str(index), component=component)
        return self._statuses

    def kill(self) -> None:
        """End every rank at once, also one that hangs."""
        here = ray.get_runtime_context().get_node_id()
        for status in self._statuses:
            if status.node_id == here:
                # A stopped or spinning process does not answer Ray's request to exit; this signal it cannot ignore.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(status.pid, signal.SIGKILL)
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)

    async def _all(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Call a method of every rank, and return the results in the order of the ranks."""
        calls = call_ranks(self._ranks, method, *args)
        return (await Answers.gather(timeout_s or self._step_timeout_s, calls)).results()

    async def _first(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call a method of rank 0 alone; it must not be one in which ranks exchange anything."""
        call = getattr(self._ranks[0], method).remote(*args)
        return (await Answers.gather(timeout_s or self._step_timeout_s, [call])).results()[0]


def rank_actor(config: Config) -> dict[str, Any]:
    """Return Ray's options for a rank."""
    stage, need, mesh = config.denoiser, config.denoiser.rank, Mesh.of(config.denoiser.parallel)
    # Ranks that share weights read each other's devices, see `symmetric_memory`.
    shared = stage.symmetric_memory and need.num_gpus > 0 and (mesh.tensor > 1 if mesh else stage.parallel.size > 1)
    return {
        "num_cpus": need.num_cpus,
        "num_gpus": need.num_gpus,
        "resources": need.resources or None,
        "runtime_env": {"env_vars": SEE_ALL_GPUS} if shared else None,
    }


def call_ranks(ranks: list[Any], method: str, *args: Any) -> list[Any]:
    """Call a method of each of these ranks, outside of the context of any request.

    Ray cancels the calls that were made for a request when the request is cancelled, and finds them by the context. A
    rank that left out what the others did would be out of step, so one cancelled request would cost all others their
    group.

    Returns:
        Ray's references to the answers, by rank.
    """
    return contextvars.Context().run(lambda: [getattr(rank, method).remote(*args) for rank in ranks])
