"""The denoiser's deployment: a coordinator on bundle 0 of a placement group whose other bundles hold the ranks.

Needs no torch: all math is done by the ranks.
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
from serve_app.engine.admission_queue import Leaving
from serve_app.engine.engine import Engine
from serve_app.engine.group import Group, GroupLost
from serve_app.engine.sample_request import Denoised, EncodedRequest, Moved, SampleRequest
from serve_app.engine.saver import latest
from serve_app.errors import one_line
from serve_app.events import Progress
from serve_app.logs import get_logger
from serve_app.stages import drain_watcher as retirement
from serve_app.stages.client_liveness import ClientLiveness
from serve_app.stages.encoder import Encoded
from serve_app.storage import Storage

if TYPE_CHECKING:
    from serve_app.wan.weights.checkpoint import Expert

logger = get_logger(__name__)

# Time for the streams in flight to tell their callers why, before the process goes.
_LAST_WORDS_S = 0.5
# A storage that does not answer is not waited for longer: a job that begins anew is better than one that does not.
_STORAGE_S = 20.0


@dataclass(frozen=True)
class Started:
    """A sample is in the engine, with `step` steps behind it. Carries what its caller cannot know, for the embeddings
    do not pass there."""

    encode_seconds: float
    truncated: list[str]
    step: int


@serve.deployment(name="Denoiser")
class Denoiser:
    """Starts its group, and answers `denoise`.

    Args:
        config: the deployment's configuration.
        experts: which ones its ranks hold; None is all.
    """

    async def __init__(self, config: Config, experts: tuple[Expert, ...] | None = None) -> None:  # type: ignore[misc]  # Serve awaits it
        self._config = config
        placement_group = ray.util.get_current_placement_group()
        if placement_group is None:
            raise RuntimeError("a denoiser replica needs a placement group, expected `placement_group_bundles`")
        self._storage = Storage(config.storage_options)
        self._group = await Group.start(config, placement_group, first_bundle=1, experts=experts)
        self._engine = Engine(self._group, config, experts)
        self._callers = ClientLiveness()
        self._tasks = [
            asyncio.create_task(self._leave_when_lost(), name="leave-when-lost"),
            asyncio.create_task(retirement.watch(self._routed), name="retirement"),
        ]
        self._admit.set_max_batch_size(config.denoiser.batch.size)
        self._admit.set_batch_wait_timeout_s(config.denoiser.batch.wait_s)

    async def denoise(
        self,
        ticket: SampleRequest,
        encoded: Encoded,
        state: bytes | None = None,
        resume: bool = False,
        caller: Any = None,
    ) -> AsyncIterator[Started | Progress | Denoised | Moved]:
        """Denoise one sample, telling its start and each step; the last event carries the latents, or says that the
        sample goes on elsewhere.

        Ending the stream early frees the ranks at the next step, and so does the end of the caller's process.

        Args:
            state: where to go on, from a `Moved`.
            resume: whether to look for a saved state where none is given.
            caller: see `stages.callers`.

        Raises:
            JobFailed: the sample failed, or its group was lost (then retryable).
        """
        if state is None and resume and ticket.state_prefix is not None:
            state = await self._saved(ticket)
        with self._callers.serving(caller):
            try:
                async with self._engine.seat(ticket):
                    error = await self._admit(EncodedRequest(ticket, encoded.positive, encoded.negative, state))
                    if error is not None:
                        raise error
                    yield Started(encoded.seconds, encoded.truncated, self._engine.step_of(ticket.id))
                    async for event in self._engine.events(ticket.id):
                        yield event
            except Leaving:
                yield Moved()

    async def describe(self) -> dict[str, Any]:
        """What the engine has done so far.

        Samples inside; steps, and samples advanced by them, whose ratio is the batching achieved; steps that did not
        fit into memory; seconds of the steps on the ranks and of all that is around them, and of each of the latest
        steps, the newest last; how the ranks share a step; and of each rank its samples and its memory in MiB.
        """
        engine = self._engine
        return {
            "resident": engine.resident,
            "steps": engine.steps,
            "advanced": engine.advanced,
            "out_of_memory": engine.out_of_memory,
            "step_s": engine.step_s,
            "overhead_s": engine.overhead_s,
            "latest_s": [round(seconds, 4) for seconds in engine.latest_s],
            "mesh": str(self._group.mesh),
            "ranks": [
                {
                    "samples": rank.samples,
                    "rss_mib": rank.rss_mib,
                    "device_mib": rank.device_mib,
                    "retries": rank.retries,
                    "weights_mib": rank.weights_mib,
                }
                # Who asks may wait: it is no health check.
                for rank in await self._group.check(self._config.denoiser.step_timeout_s)
            ],
        }

    @serve.batch
    async def _admit(self, admissions: list[EncodedRequest]) -> list[Exception | None]:
        """Samples that arrive together start together, so that they can share every step."""
        results = await asyncio.gather(*(self._engine.admit(a) for a in admissions), return_exceptions=True)
        return [result if isinstance(result, Exception) else None for result in results]

    async def check_health(self) -> None:
        """Serve asks this every `denoiser.health_check_period_s`; raising has the replica replaced."""
        if self._engine.reason is not None:
            raise GroupLost(self._engine.reason)
        try:
            await self._group.check(self._config.denoiser.health_check_timeout_s / 2)
        except GroupLost as error:
            self._engine.lose(error)
            raise

    async def _saved(self, ticket: SampleRequest) -> bytes | None:
        """The state that an earlier attempt saved last."""
        assert ticket.state_prefix is not None
        try:
            return await asyncio.wait_for(latest(self._storage, ticket.state_prefix), _STORAGE_S)
        except (OSError, TimeoutError) as error:
            logger.warning("saved state not read", extra={"job": ticket.id, "error": one_line(error)})
            return None

    def _routed(self, routed: bool) -> None:
        logger.info("put back" if routed else "retired: samples move away", extra={"resident": self._engine.resident})
        if routed:
            self._engine.stay()
        else:
            self._engine.drain()

    async def _leave_when_lost(self) -> None:
        """A replica without its group is of no use: end the process, which is what Serve notices fastest.

        Serve's own way (failing health checks, then a graceful stop) takes several periods and waits for requests
        that can never finish.
        """
        await self._engine.lost.wait()
        started = time.monotonic()
        self._group.kill()
        await asyncio.sleep(max(0.0, _LAST_WORDS_S - (time.monotonic() - started)))
        logger.error("replica leaves, its group is lost", extra={"reason": self._engine.reason})
        os._exit(1)
