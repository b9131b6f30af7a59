"""The deployment that composes the stages: encoder, denoiser and decoder, by calls of their handles.

Embeddings pass from stage to stage as references. Latents, and the states of samples that move from group to group,
pass through here, because a reference is lost with the process that made it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
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
# Pause before a sample that was turned away is offered again: routers hear of a draining replica a little later.
_TURNED_AWAY_S = 0.1
# Shortest and longest pause between two tries to store a video, each of which decodes it; doubles in between.
_STORE_AGAIN_S = (1.0, 30.0)
# Pauses before a decode that did not fit into memory is tried again, perhaps by another replica; then the attempt ends.
_DECODE_AGAIN_S = (1.0, 5.0, 20.0)
# Lost stages have error codes of their own, because the video that was in a process may be the reason that it died.
_LOST = "The {} was lost with this video in it."


@dataclass
class _Denoising:
    """The denoising of a sample, in all groups that it was in.

    Attributes:
        started: the start in the latest group; None before the first.
        latents: float32 [1, channels, frames, height, width], at the end.
        seconds: how long it was in all of them.
        group_s, passes: its share of their passes, see `Flight`.
    """

    started: Started | None = None
    latents: Any = None
    seconds: float = 0.0
    group_s: float = 0.0
    passes: float = 0.0


@serve.deployment(name="Pipeline")
class Pipeline:
    """Runs a job through the stages.

    Args:
        encoder, denoiser, decoder: handles of the stages.
        low_noise_denoiser: the low-noise expert's deployment, if it has its own; `denoiser` has the other expert then.
        store_wait_s: for how many seconds latents are kept while their video cannot be stored.
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
        """Make a job's video, and yield its progress.

        Args:
            job: what to make.
            caller: handle of the process that asks, from `this_process`. The work ends when that process dies.

        Yields:
            Progress of each stage, and Done at the end. Ending the iteration early cancels the work at its next step.

        Raises:
            JobFailed: a stage refused or failed it.
        """
        with self._client_liveness.watching(caller):
            async with aclosing(self._generate(job)) as events:
                async for event in events:
                    yield event

    async def _generate(self, job: JobSpec) -> AsyncGenerator[Event, None]:
        params = job.params
        decode_s = self._decode_s_per_pixel * params.width * params.height * params.num_frames
        started = time.monotonic()

        yield Progress("encode", 0, 1)
        encoded = self._encoder.encode.remote(params.prompt, params.negative_prompt if params.guided else None)
        denoising = _Denoising()
        async with aclosing(self._denoise(job, encoded, denoising, decode_s)) as events:
            async for event in events:
                yield event
        begun, latents = denoising.started, denoising.latents
        if begun is None or latents is None:
            raise JobFailed("no_latents", "the denoiser's stream ended without latents", retryable=True)

        yield Progress("decode", 0, 1, decode_s or None)
        decode_started = time.monotonic()
        decoded = await self._decode(latents, params, job)
        self._learn_decode_time(params, time.monotonic() - decode_started)
        yield Progress("decode", 1, 1, 0.0)
        yield Done(
            outputs=decoded.outputs,
            timings={
                "encode": begun.encode_seconds,
                "denoise": denoising.seconds,
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
            group_s=denoising.group_s,
            passes=denoising.passes,
        )

    async def _denoise(
        self, job: JobSpec, encoded: Any, denoising: _Denoising, decode_s: float
    ) -> AsyncGenerator[Progress, None]:
        """Denoise a sample, in as many groups as it takes, and yield its progress.

        Args:
            job: what to make.
            encoded: the call of the text encoder.
            denoising: what is filled in.
            decode_s: estimated seconds of what comes after; 0 if unknown.
        """
        request = _sample_request(job)
        state, denoiser = None, self._denoiser
        while True:
            ended: Denoised | Moved | None = None
            resume = state is None and job.attempt > 1
            stream = denoiser.denoise.remote(request, encoded, state, resume, this_process())
            try:
                async for event in stream:
                    if isinstance(event, Started):
                        if denoising.started is None:
                            yield Progress("encode", 1, 1)
                            yield Progress("denoise", event.step, job.params.num_inference_steps)
                        denoising.started = event
                    elif isinstance(event, Progress):
                        left = None if event.seconds_left is None else event.seconds_left + decode_s
                        yield Progress("denoise", event.step, event.steps, left, event.saved_step)
                    else:
                        ended = event
                        denoising.seconds += event.seconds
                        denoising.group_s += event.group_s
                        denoising.passes += event.passes
            except RayError:
                if denoising.started is None and await _was_lost(encoded):
                    raise JobFailed("encoder_lost", _LOST.format("text encoder"), retryable=True) from None
                raise
            finally:
                # Serve does this where the request was cancelled, but not where it ends for another reason.
                _cancel(stream)
                if ended is None:
                    _cancel(encoded)  # if the text still waits, it need not be encoded any more
            if not isinstance(ended, Moved):
                denoising.latents = None if ended is None else ended.latents
                return
            logger.info("moved", extra={"job": job.id, "with_state": ended.state is not None})
            state = ended.state or state
            if ended.high_noise is not None:
                denoiser = self._denoiser if ended.high_noise else self._low_noise_denoiser
            if ended.state is None:
                await asyncio.sleep(_TURNED_AWAY_S)

    async def _decode(self, latents: Any, params: Params, job: JobSpec) -> Decoded:
        """Decode and store. Repeat that while the storage is away or full, and a few times if memory is short.

        Meanwhile the latents stay in this process: where a video cannot be stored, a state could not be saved either.
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
                _cancel(decoding)  # as for the denoiser's stream
            await asyncio.sleep(pause_s)
            pause_s, again = min(2 * pause_s, _STORE_AGAIN_S[1]), True

    def _learn_decode_time(self, params: Params, seconds: float) -> None:
        measured = seconds / (params.width * params.height * params.num_frames)
        known = self._decode_s_per_pixel
        self._decode_s_per_pixel = known + _NEWEST * (measured - known) if known else measured


def _sample_request(job: JobSpec) -> SampleRequest:
    return SampleRequest(
        # The attempt is part of the id: a second attempt may come while the first is still being cancelled.
        id=f"{job.id}.{job.attempt}",
        params=job.params,
        priority=job.priority,
        created_at=job.created_at,
        state_prefix=job.state_prefix,
        alone=job.losses > 0,
    )


def _cancel(response: Any) -> None:
    """Cancel a call, wherever it is; without effect once it has ended."""
    with suppress(RayServeException):
        response.cancel()


async def _was_lost(response: Any) -> bool:
    """Return whether a call ended with the death of the process that it was sent to."""
    try:
        await asyncio.wait_for(response, 1)
    except RayActorError:
        return True
    except Exception:
        return False
    return False
