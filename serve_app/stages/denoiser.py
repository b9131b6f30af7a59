"""The denoiser's deployment: a coordinator on bundle 0 of a placement group whose other bundles hold the ranks.

Needs no torch: all math is done by the ranks.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import ray
from ray import serve

from serve_app.config import Config
from serve_app.engine.engine import Admission, Denoised, Engine
from serve_app.engine.group import Group, GroupLost
from serve_app.events import Progress
from serve_app.logs import get_logger
from serve_app.request import Params
from serve_app.stages.encoder import Encoded

log = get_logger(__name__)

# Time for the streams in flight to tell their callers why, before the process goes.
_LAST_WORDS_S = 0.5


@dataclass(frozen=True)
class Started:
    """A sample is in the engine. Carries what its caller cannot know, for the embeddings do not pass there."""

    encode_seconds: float
    truncated: list[str]


@serve.deployment(name="Denoiser")
class Denoiser:
    """Starts its group, and answers `denoise`.

    Args:
        config: the deployment's configuration.
    """

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it
        self._config = config
        placement_group = ray.util.get_current_placement_group()
        if placement_group is None:
            raise RuntimeError("a denoiser replica needs a placement group, expected `placement_group_bundles`")
        self._group = await Group.start(config, placement_group, first_bundle=1)
        self._engine = Engine(self._group, config)
        self._watch = asyncio.create_task(self._leave_when_lost(), name="leave-when-lost")
        self._admit.set_max_batch_size(config.denoiser.batch.size)
        self._admit.set_batch_wait_timeout_s(config.denoiser.batch.wait_s)

    async def denoise(
        self, sample_id: str, params: Params, encoded: Encoded
    ) -> AsyncIterator[Started | Progress | Denoised]:
        """Denoise one sample, telling its start and each step; the last event refers to the latents.

        Ending the stream early frees the ranks at the next step.

        Raises:
            JobFailed: the sample failed, or its group was lost (then retryable).
        """
        async with self._engine.seat(sample_id):
            error = await self._admit(Admission(sample_id, params, encoded.positive, encoded.negative))
            if error is not None:
                raise error
            yield Started(encoded.seconds, encoded.truncated)
            async for event in self._engine.events(sample_id):
                yield event

    async def describe(self) -> dict[str, int]:
        """Samples inside, steps done so far, and samples advanced by them: their ratio is the batching achieved."""
        return {"resident": self._engine.resident, "steps": self._engine.steps, "advanced": self._engine.advanced}

    @serve.batch
    async def _admit(self, admissions: list[Admission]) -> list[Exception | None]:
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

    async def _leave_when_lost(self) -> None:
        """A replica without its group is of no use: end the process, which is what Serve notices fastest.

        Serve's own way (failing health checks, then a graceful stop) takes several periods and waits for requests
        that can never finish.
        """
        await self._engine.lost.wait()
        started = time.monotonic()
        self._group.kill()
        await asyncio.sleep(max(0.0, _LAST_WORDS_S - (time.monotonic() - started)))
        log.error("replica leaves, its group is lost", extra={"reason": self._engine.reason})
        os._exit(1)
