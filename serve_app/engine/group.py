"""The ranks of one denoiser replica, seen from its coordinator: start them, have them step, notice when one is gone."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve_app.compute import SEE_ALL_GPUS
from serve_app.config import Config
from serve_app.engine.messages import Admitted, DeviceBroken, RankStatus, StepRequest, StepResult, Survey
from serve_app.engine.rank import RankActor
from serve_app.errors import ServeAppError
from serve_app.logs import get_logger
from serve_app.request import Params
from serve_app.wan.cost import activation_bytes
from serve_app.wan.parallel.mesh import Mesh, default_mesh

if TYPE_CHECKING:
    from serve_app.wan.weights.checkpoint import Expert

logger = get_logger(__name__)

# A call that failed on one rank leaves the others waiting in a collective for ever; this is how long they may lag.
_STRAGGLER_S = 5.0


class GroupLost(ServeAppError):
    """A rank died or hangs: the whole group must be replaced, for the others wait for it in a collective.

    Args:
        message: what happened.
        host: whether it was the rank's host that went, which no sample can be the reason of.
    """

    def __init__(self, message: str, host: bool = False) -> None:
        super().__init__(message)
        self.host = host


class Group:
    """A started group. Every method is called on all ranks alike, in the same order: that keeps them in step.

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
        """Start the ranks on the bundles from `first_bundle` on, one each, load the shards and run them once.

        Args:
            experts: which ones the ranks hold; None is all.

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
        timeout = config.denoiser.start_timeout_s
        try:
            started = time.monotonic()
            if Mesh.of(parallel) is None:
                seen: Survey = (await group._within(timeout, ranks[0].survey.remote()))[0]
                work = functools.partial(
                    activation_bytes,
                    seen.shape,
                    config.most_tokens,
                    config.model.itemsize,
                    compiled=config.denoiser.compile,
                )
                group.mesh, why = default_mesh(
                    parallel.size, seen.shape, seen.weight_bytes.__getitem__, seen.device_bytes, work
                )
                logger.info("mesh picked", extra={"mesh": str(group.mesh), "reason": why})
            address, port = (await group._within(timeout, ranks[0].rendezvous.remote()))[0]
            loaded = await group._all("load", address, port, group.mesh, timeout_s=timeout)
            group._statuses = await group._all("status", timeout_s=timeout)
            if config.denoiser.warmup:
                await group._all("warm_up", group.warm_up_params(), timeout_s=timeout)
        except BaseException:
            group.kill()
            raise
        logger.info(
            "group ready",
            extra={
                "ranks": len(ranks),
                "mesh": str(group.mesh),
                "seconds": round(time.monotonic() - started, 2),
                "load_seconds": [round(rank["seconds"], 2) for rank in loaded],
                "peak_rss_mib": [round(rank["peak_rss_mib"]) for rank in loaded],
            },
        )
        return group

    def warm_up_params(self) -> Params:
        """The default request of this deployment."""
        return Params(**self._config.defaults.model_dump(), prompt="warm-up", seed=0)

    async def admit(
        self,
        sample_id: str,
        params: Params,
        positive: np.ndarray,
        negative: np.ndarray | None,
        state: bytes | None = None,
    ) -> Admitted:
        """Give every rank the sample. What is large travels once per host, not once per rank."""
        shared = [None if one is None else ray.put(one) for one in (positive, negative, state)]
        return (await self._all("admit", sample_id, params, *shared))[0]

    async def step(self, order: StepRequest) -> StepResult:
        """One denoising step on all ranks.

        Raises:
            GroupLost: a rank died or the step exceeded `denoiser.step_timeout_s`.
            OutOfMemory: on every rank; nothing has changed.
            Exception: what the step raised on every rank; the group is still in step.
        """
        # Every rank has the same latents to the bit, so what one says of them holds for all.
        seconds, failed = (await self._all("step", [order.advance, order.park, order.save]))[0]
        return StepResult(seconds, failed)

    async def save(self, sample_id: str) -> bytes:
        """A sample's state, for another group to continue."""
        state: bytes = (await self._within(self._step_timeout_s, self._ranks[0].save.remote(sample_id)))[0]
        return state

    async def latents(self, sample_id: str) -> np.ndarray:
        """The sample's latents, float32 [1, channels, frames, height, width]."""
        latents: np.ndarray = (await self._within(self._step_timeout_s, self._ranks[0].latents.remote(sample_id)))[0]
        return latents

    async def drop(self, sample_ids: list[str]) -> None:
        """Forget samples on every rank."""
        await self._all("drop", sample_ids)

    async def check(self, timeout_s: float) -> list[RankStatus]:
        """Ask every rank for a sign of life.

        Raises:
            GroupLost: a rank is dead, does not answer within `timeout_s`, or is stuck in a step.
        """
        self._statuses = await self._all("status", timeout_s=timeout_s)
        limit = self._step_timeout_s
        for index, status in enumerate(self._statuses):
            if status.busy_s is not None and status.busy_s > limit:
                raise GroupLost(f"rank {index} has been in one step for {status.busy_s:.0f} s, expected {limit:.0f} s")
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
        return await self._within(timeout_s or self._step_timeout_s, *_called(self._ranks, method, *args))

    async def _within(self, timeout_s: float, *references: Any) -> list[Any]:
        """Results of a call on every rank; an error counts as the group's own unless a rank is gone."""
        answers = [asyncio.wrap_future(reference.future()) for reference in references]
        done, late = await asyncio.wait(answers, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        # Where a rank has died the others' answers decide nothing: they may be waiting for it in a collective.
        failed = [error for answer in done if (error := answer.exception())]
        if late and failed and not any(isinstance(_cause(error), RayActorError | DeviceBroken) for error in failed):
            more, late = await asyncio.wait(late, timeout=_STRAGGLER_S)
            done |= more
        for answer in late:
            answer.cancel()
        errors = [_cause(error) for answer in answers if answer in done and (error := answer.exception())]
        for error in errors:
            if isinstance(error, RayActorError):
                raise GroupLost(f"a rank died: {_first_line(error)}", host=_host_died(error)) from error
            if isinstance(error, DeviceBroken):
                raise GroupLost(f"a rank's device failed: {error}") from error
        # On a device a rank runs ahead: what it has begun alone the others would take for the first of the next step.
        apart = len({getattr(error, "exchanged", 0) for error in errors}) > 1
        if errors and (late or apart or len(errors) < len(answers)):
            raise GroupLost(f"the ranks are out of step: {_first_line(errors[0])}") from errors[0]
        if errors:
            raise errors[0]
        if late:
            raise GroupLost(f"{len(late)} of {len(answers)} ranks did not answer within {timeout_s:.0f} s")
        return [answer.result() for answer in answers]


def rank_actor(config: Config) -> dict[str, Any]:
    """Ray's options for a rank."""
    stage, need, mesh = config.denoiser, config.denoiser.rank, Mesh.of(config.denoiser.parallel)
    # Those that share weights show each other their devices' memory, see `symmetric_memory`.
    shared = stage.symmetric_memory and need.num_gpus > 0 and (mesh.tensor > 1 if mesh else stage.parallel.size > 1)
    return {
        "num_cpus": need.num_cpus,
        "num_gpus": need.num_gpus,
        "resources": need.resources or None,
        "runtime_env": {"env_vars": SEE_ALL_GPUS} if shared else None,
    }


def _called(ranks: list[Any], method: str, *args: Any) -> list[Any]:
    """A call on each of these ranks, on nobody's behalf.

    With a request Ray cancels the calls that were made for it, which it knows by the context. A rank that then left out
    what the others did would be out of step, and a request that is cancelled may not cost the others their group.
    """
    return contextvars.Context().run(lambda: [getattr(rank, method).remote(*args) for rank in ranks])


def _cause(error: BaseException) -> BaseException:
    """What was raised on the rank; Ray's wrapper only adds where."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, ServeAppError):
        return error.cause
    return GroupLost(str(error)) if isinstance(error, GetTimeoutError) else error


def _host_died(error: RayActorError) -> bool:
    """Whether the actor went with its host, or the link to it. Ray says the former in words only."""
    return isinstance(error, ActorUnavailableError) or "its node has died" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
