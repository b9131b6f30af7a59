"""The deployment that composes the stages: encoder, denoiser, decoder, as a DAG of handle calls.

Embeddings and latents pass from stage to stage as references; this process sees neither.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.engine.engine import Denoised
from serve_app.errors import JobFailed
from serve_app.events import Done, Event, Progress
from serve_app.logs import get_logger
from serve_app.request import Params
from serve_app.stages.decoder import Decoded
from serve_app.stages.denoiser import Started

log = get_logger(__name__)

# Weight of the newest decode in the running mean of seconds per pixel.
_NEWEST = 0.3


@serve.deployment(name="Pipeline")
class Pipeline:
    """Runs a job through the stages.

    Args:
        encoder, denoiser, decoder: handles of the stages.
    """

    def __init__(self, encoder: DeploymentHandle, denoiser: DeploymentHandle, decoder: DeploymentHandle) -> None:
        self._encoder = encoder
        self._denoiser = denoiser.options(stream=True)
        self._decoder = decoder
        self._decode_s_per_pixel = 0.0

    async def generate(self, job: dict[str, Any]) -> AsyncIterator[Event]:
        """Make a job's video.

        Args:
            job: `id`, `attempt`, `params` (of `Params`) and `prefix` (the storage prefix of its files).

        Yields:
            Progress of each stage, and Done at the end. Ending the iteration early cancels the work at its next step.

        Raises:
            JobFailed: a stage refused or failed it.
        """
        params = Params(**job["params"])
        # The attempt is part of the name: a second attempt may arrive while the first is still being cancelled.
        sample_id = f"{job['id']}.{job['attempt']}"
        decode_s = self._decode_s_per_pixel * params.width * params.height * params.num_frames

        started = time.monotonic()
        yield Progress("encode", 0, 1)
        encoded = self._encoder.encode.remote(params.prompt, params.negative_prompt if params.guided else None)
        begun: Started | None = None
        denoised: Denoised | None = None
        async for event in self._denoiser.denoise.remote(sample_id, params, encoded):
            if isinstance(event, Started):
                begun = event
                yield Progress("encode", 1, 1)
                yield Progress("denoise", 0, params.num_inference_steps)
            elif isinstance(event, Progress):
                left = None if event.seconds_left is None else event.seconds_left + decode_s
                yield Progress("denoise", event.step, event.steps, left)
            else:
                denoised = event
        if begun is None or denoised is None:
            raise JobFailed("no_latents", "the denoiser's stream ended without latents", retryable=True)

        yield Progress("decode", 0, 1, decode_s or None)
        decode_started = time.monotonic()
        decoded: Decoded = await self._decoder.decode.remote(denoised.latents, params, job["prefix"], job["id"])
        self._learn(params, time.monotonic() - decode_started)
        yield Progress("decode", 1, 1, 0.0)
        yield Done(
            outputs=decoded.outputs,
            timings={
                "encode": begun.encode_seconds,
                "denoise": denoised.seconds,
                "decode": decoded.timings["vae"],
                "store": decoded.timings["store"],
                "total": time.monotonic() - started,
            },
            size_bytes=decoded.size_bytes,
            warnings=[
                f"'{name}' is longer than the text encoder reads; its end was ignored." for name in begun.truncated
            ],
        )

    def _learn(self, params: Params, seconds: float) -> None:
        measured = seconds / (params.width * params.height * params.num_frames)
        known = self._decode_s_per_pixel
        self._decode_s_per_pixel = known + _NEWEST * (measured - known) if known else measured
