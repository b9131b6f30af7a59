"""The denoiser's deployment: a coordinator on bundle 0 of a placement group whose other bundles hold the ranks.

Needs no torch, because the ranks do all math.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from serve_app.config import Config
from serve_app.engine.engine import Engine
from serve_app.engine.errors import GroupLost, NotAdmitting
from serve_app.engine.group import Group
from serve_app.engine.sample_request import Denoised, EncodedRequest, Moved, SampleRequest
from serve_app.engine.saver import latest_state
from serve_app.errors import one_line
from serve_app.events import Progress
from serve_app.logs import get_logger
from serve_app.metrics import export
from serve_app.stages.client_liveness import ClientLiveness
from serve_app.stages.drain_watcher import watch_routing
from serve_app.stages.encoder import Encoded
from serve_app.stages.status_board import StatusBoard
from serve_app.storage import Storage

if TYPE_CHECKING:
    from serve_app.wan.weights.checkpoint import Expert

logger = get_logger(__name__)

# Time for the streams in flight to tell their callers why, before the process ends.
_LAST_WORDS_S = 0.5
# How long to wait for a saved state: a job that begins anew is better than one that does not begin.
_STORAGE_S = 20.0


@dataclass(frozen=True)
class Started:
    """A sample has been admitted. Tells its caller of the encoding too, because the embeddings do not pass there.

    Attributes:
        encode_seconds: how long the text encoder took.
        truncated: which of `prompt` and `negative_prompt` were longer than the encoder reads.
        step: how many steps the sample has behind it.
    """

    encode_seconds: float
    truncated: list[str]
    step: int


@serve.deployment(name="Denoiser")
class Denoiser:
    """Starts its group, and answers `denoise`.

    Args:
        config: the deployment's configuration.
        experts: which experts its ranks hold; None is all.
    """

    async def __init__(self, config: Config, experts: tuple[Expert, ...] | None = None) -> None:  # type: ignore[misc]  # Serve awaits it
        self._config = config
        placement_group = ray.util.get_current_placement_group()
        if placement_group is None:
            raise RuntimeError("a denoiser replica needs a placement group, expected `placement_group_bundles`")
        self._storage = Storage(config.storage_options)
        self._group = await Group.start(config, placement_group, first_bundle=1, experts=experts)
        self._engine = Engine(self._group, config, experts)
        self._client_liveness = ClientLiveness()
        export.start("coordinator")
        self._experts = experts
        self._board = StatusBoard(self.status)
        self._tasks = [
            asyncio.create_task(self._leave_when_lost(), name="leave-when-lost"),
            asyncio.create_task(watch_routing(self._on_routing), name="watch-routing"),
        ]
        self._admit.set_max_batch_size(config.denoiser.batch.size)
        self._admit.set_batch_wait_timeout_s(config.denoiser.batch.wait_s)

    async def denoise(
        self,
        request: SampleRequest,
        encoded: Encoded,
        state: bytes | None = None,
        resume: bool = False,
        caller: Any = None,
    ) -> AsyncIterator[Started | Progress | Denoised | Moved]:
        """Denoise one sample, and yield its start and each step.

        The last event carries the latents, or says that the sample goes on elsewhere. Ending the stream early frees the
        ranks at the next step, and so does the end of the caller's process.

        Args:
            request: the sample.
            encoded: its embeddings.
            state: where to go on, from a `Moved`.
            resume: whether to look for a saved state where none is given.
            caller: handle of the process that asks, see `client_liveness`.

        Raises:
            JobFailed: the sample failed, or its group was lost (then retryable).
        """
        if state is None and resume and request.state_prefix is not None:
            state = await self._saved_state(request)
        with self._client_liveness.watching(caller):
            try:
                async with self._engine.place(request):
                    error = await self._admit(EncodedRequest(request, encoded.positive, encoded.negative, state))
                    if error is not None:
                        raise error
                    yield Started(encoded.seconds, encoded.truncated, self._engine.step_of(request.id))
                    async for event in self._engine.events(request.id):
                        yield event
            except NotAdmitting:
                yield Moved()

    def status(self) -> dict[str, Any]:
        """Return the group's status for people, as of the latest health check; called from another thread."""
        return {
            "kind": "group",
            "mesh": str(self._group.mesh),
            "experts": list(self._experts or ()),
            "samples": self._engine.overview(),
            "waiting": self._engine.waiting,
            "memory": [rank.memory.plain() for rank in self._group.statuses],
            "tight": self._engine.tight,
        }

    async def describe(self) -> dict[str, Any]:
        """Return what the engine has done so far.

        Returns:
            `resident`, the number of samples inside; the fields of `Counters`, in which `advanced` over `steps` is the
            batching achieved, and `latest_s` has the newest step last; `mesh`, how the ranks share a step; and `ranks`,
            with the samples of each and its memory in MiB.
        """
        counters = self._engine.counters
        return {
            "resident": self._engine.resident,
            "steps": counters.steps,
            "advanced": counters.advanced,
            "out_of_memory": counters.out_of_memory,
            "step_s": counters.step_s,
            "overhead_s": counters.overhead_s,
            "latest_s": [round(seconds, 4) for seconds in counters.latest_s],
            "mesh": str(self._group.mesh),
            "ranks": [
                {
                    "samples": rank.samples,
                    "rss_mib": rank.rss_mib,
                    "device_mib": rank.device_mib,
                    "retries": rank.retries,
                    "weights_mib": rank.weights_mib,
                    "memory": rank.memory.plain(),
                }
                # This may take as long as a step: it is no health check.
                for rank in await self._group.check_ranks(self._config.denoiser.step_timeout_s)
            ],
        }

    @serve.batch
    async def _admit(self, encoded: list[EncodedRequest]) -> list[Exception | None]:
        """Admit samples that arrive together at once, so that they can share every step."""
        results = await asyncio.gather(*(self._engine.admit(one) for one in encoded), return_exceptions=True)
        return [result if isinstance(result, Exception) else None for result in results]

    async def check_health(self) -> None:
        """Check the ranks. Serve calls this every `denoiser.health_check_period_s`, and replaces a replica that raises.

        Raises:
            GroupLost: the group cannot go on.
        """
        if self._engine.reason is not None:
            raise GroupLost(self._engine.reason)
        try:
            await self._group.check_ranks(self._config.denoiser.health_check_timeout_s / 2)
        except GroupLost as error:
            self._engine.lose(error)
            raise

    async def _saved_state(self, request: SampleRequest) -> bytes | None:
        """Return the state that an earlier attempt saved last; None if there is none, or the storage is away."""
        assert request.state_prefix is not None
        try:
            return await asyncio.wait_for(latest_state(self._storage, request.state_prefix), _STORAGE_S)
        except (OSError, TimeoutError) as error:
            logger.warning("saved state not read", extra={"job": request.id, "error": one_line(error)})
            return None

    def _on_routing(self, routed: bool) -> None:
        logger.info(
            "samples stay" if routed else "draining: samples move away", extra={"resident": self._engine.resident}
        )
        if routed:
            self._engine.stop_draining()
        else:
            self._engine.drain()

    async def _leave_when_lost(self) -> None:
        """End the process once its group is lost: without one a replica is of no use, and Serve notices this fastest.

        Serve's own way (failing health checks, then a graceful stop) takes several periods and waits for requests
        that can never finish.
        """
        await self._engine.lost.wait()
        started = time.monotonic()
        self._group.kill()
        await asyncio.sleep(max(0.0, _LAST_WORDS_S - (time.monotonic() - started)))
        logger.error("replica leaves, its group is lost", extra={"reason": self._engine.reason})
        os._exit(1)
