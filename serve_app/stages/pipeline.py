"""The deployment that composes the stages: encoder, denoiser, decoder, as a DAG of handle calls.

Embeddings pass from stage to stage as references. Latents, and the states of samples that move from group to group,
pass through here: a reference would be worth nothing once the process that it came from has gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.engine.sample_request import Denoised, Moved, SampleRequest
from serve_app.errors import JobFailed
from serve_app.events import Done, Event, Progress
from serve_app.job_spec import JobSpec
from serve_app.logs import get_logger
from serve_app.replica import this_process
from serve_app.request import Params
from serve_app.stages.client_liveness import ClientLiveness
from serve_app.stages.decoder import Decoded
from serve_app.stages.denoiser import Started

logger = get_logger(__name__)

# Weight of the newest decode in the running mean of seconds per pixel.
_NEWEST = 0.3
# Before a sample that was turned away is offered again: routers hear a little later than the replica that it leaves.
_TURNED_AWAY_S = 0.1
# Between two tries to store a video, each of which decodes it; doubles from the first to the second.
_STORE_AGAIN_S = (1.0, 30.0)
# Before a decode that memory was short for is tried again, each a chance for another replica; then the attempt ends.
_DECODE_AGAIN_S = (1.0, 5.0, 20.0)
# With codes of their own, since what was in a process when it died may be the reason.
_LOST = "The {} was lost with this video in it."


@serve.deployment(name="Pipeline")
class Pipeline:
    """Runs a job through the stages.

    Args:
        encoder, denoiser, decoder: handles of the stages.
        low_noise_denoiser: where the low-noise expert has a deployment of its own; `denoiser` then has the other one.
        store_wait_s: how long latents are kept while the storage does not take their video.
    """

    def __init__(
        self,
        encoder: DeploymentHandle,
        denoiser: DeploymentHandle,
        decoder: DeploymentHandle,
        low_noise_denoiser: DeploymentHandle | None = None,
        store_wait_s: float = 3600,
    ) -> None:
        # `options` has a handle look for its replicas now, and not when the first job waits for it.
        self._encoder = encoder.options()
        self._denoiser = denoiser.options(stream=True)
        self._low_noise_denoiser = (low_noise_denoiser or denoiser).options(stream=True)
        self._decoder = decoder.options()
        self._store_wait_s = store_wait_s
        self._decode_s_per_pixel = 0.0
        self._client_liveness = ClientLiveness()

    async def generate(self, job: JobSpec, caller: Any = None) -> AsyncIterator[Event]:
        """Make a job's video.

        Args:
            caller: handle of the process that asks, from `this_process`. The work ends when that process dies.

        Yields:
            Progress of each stage, and Done at the end. Ending the iteration early cancels the work at its next step.

        Raises:
            JobFailed: a stage refused or failed it.
        """
        with self._client_liveness.serving(caller):
            async with aclosing(self._generate(job)) as events:
                async for event in events:
                    yield event

    async def _generate(self, job: JobSpec) -> AsyncGenerator[Event, None]:
        params = job.params
        # The attempt is part of the name: a second attempt may arrive while the first is still being cancelled.
        request = SampleRequest(
            id=f"{job.id}.{job.attempt}",
            params=params,
            priority=job.priority,
            created_at=job.created_at,
            state_prefix=job.state_prefix,
            alone=job.losses > 0,
        )
        decode_s = self._decode_s_per_pixel * params.width * params.height * params.num_frames

        started = time.monotonic()
        yield Progress("encode", 0, 1)
        encoded = self._encoder.encode.remote(params.prompt, params.negative_prompt if params.guided else None)
        begun: Started | None = None
        denoised: Denoised | Moved | None = Moved()
        state, denoiser, denoise_s = None, self._denoiser, 0.0
        while isinstance(denoised, Moved):
            denoised = None
            resume = state is None and job.attempt > 1
            stream = denoiser.denoise.remote(request, encoded, state, resume, this_process())
            try:
                async for event in stream:
                    if isinstance(event, Started):
                        if begun is None:
                            yield Progress("encode", 1, 1)
                            yield Progress("denoise", event.step, params.num_inference_steps)
                        begun = event
                    elif isinstance(event, Progress):
                        left = None if event.seconds_left is None else event.seconds_left + decode_s
                        yield Progress("denoise", event.step, event.steps, left)
                    else:
                        denoised = event
                        denoise_s += event.seconds
            except RayError:
                if begun is None and await _was_lost(encoded):
                    raise JobFailed("encoder_lost", _LOST.format("text encoder"), retryable=True) from None
                raise
            finally:
                # Serve does this where the request was cancelled, but not where it ends for another reason.
                _cancel(stream)
                if denoised is None:
                    _cancel(encoded)  # a text that waits to be encoded need not be
            if isinstance(denoised, Moved):
                logger.info("moved", extra={"job": job.id, "with_state": denoised.state is not None})
                state = denoised.state or state
                if denoised.high_noise is not None:
                    denoiser = self._denoiser if denoised.high_noise else self._low_noise_denoiser
                if denoised.state is None:
                    await asyncio.sleep(_TURNED_AWAY_S)
        if begun is None or denoised is None:
            raise JobFailed("no_latents", "the denoiser's stream ended without latents", retryable=True)

        yield Progress("decode", 0, 1, decode_s or None)
        decode_started = time.monotonic()
        decoded = await self._decode(denoised.latents, params, job)
        self._learn(params, time.monotonic() - decode_started)
        yield Progress("decode", 1, 1, 0.0)
        yield Done(
            outputs=decoded.outputs,
            timings={
                "encode": begun.encode_seconds,
                "denoise": denoise_s,
                "decode": decoded.timings["vae"],
                "store": decoded.timings["store"],
                "total": time.monotonic() - started,
            },
            size_bytes=decoded.size_bytes,
            warnings=[
                *(f"'{name}' is longer than the text encoder reads; its end was ignored." for name in begun.truncated),
                *decoded.warnings,
            ],
            revision=decoded.revision,
        )

    async def _decode(self, latents: Any, params: Params, job: JobSpec) -> Decoded:
        """Decode and store, again and again while the storage is away or full, and a few times if memory is short.

        The latents stay here meanwhile, in memory: where a video cannot be stored, no saved state could be either.
        """
        until = time.monotonic() + self._store_wait_s
        pause_s, again = _STORE_AGAIN_S[0], False
        pauses = iter(_DECODE_AGAIN_S)
        while True:
            decoding = self._decoder.decode.remote(latents, params, job.prefix, job.id, again, this_process())
            try:
                decoded: Decoded = await decoding
                return decoded
            except RayActorError as error:
                raise JobFailed("decoder_lost", _LOST.format("decoder"), retryable=True) from error
            except RayTaskError as error:
                failed = error.cause
                if not isinstance(failed, JobFailed) or not failed.retryable:
                    raise
                if failed.code == "out_of_memory":
                    short_s = next(pauses, None)
                    if short_s is None:
                        raise
                    logger.warning("not decoded, tried again", extra={"job": job.id, "error": failed.message})
                    await asyncio.sleep(short_s)
                    continue
                if failed.code != "store_failed" or time.monotonic() + pause_s > until:
                    raise
                logger.warning("not stored, tried again", extra={"job": job.id, "error": failed.message})
            finally:
                _cancel(decoding)  # as with the denoiser's stream
            await asyncio.sleep(pause_s)
            pause_s, again = min(2 * pause_s, _STORE_AGAIN_S[1]), True

    def _learn(self, params: Params, seconds: float) -> None:
        measured = seconds / (params.width * params.height * params.num_frames)
        known = self._decode_s_per_pixel
        self._decode_s_per_pixel = known + _NEWEST * (measured - known) if known else measured


def _cancel(response: Any) -> None:
    """Cancel a call, wherever it is. Without effect once it has ended."""
    with suppress(RayServeException):
        response.cancel()


async def _was_lost(response: Any) -> bool:
    """Whether a call ended with the death of the process that it was sent to."""
    try:
        await asyncio.wait_for(response, 1)
    except RayActorError:
        return True
    except Exception:
        return False
    return False
