"""The deployment that composes the stages: encoder, denoiser, decoder and finisher, by calls of their handles.

Embeddings pass from stage to stage as references. Latents, and the states of samples that move from group to group,
pass through here, because a reference is lost with the process that made it. Frames go from decoder to finisher.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.config import FinisherConfig
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
from serve_app.stages.finisher import FinishRequest
from serve_app.stages.finishing import Finishing, Pace

logger = get_logger(__name__)

# Pause before a sample that was turned away is offered again: routers hear of a draining replica a little later.
_TURNED_AWAY_S = 0.1
# Shortest and longest pause between two tries to store a video, each of which decodes it; doubles in between.
_STORE_AGAIN_S = (1.0, 30.0)
# Pauses before a decode that did not fit into memory is tried again, perhaps by another replica; then the attempt ends.
_DECODE_AGAIN_S = (1.0, 5.0, 20.0)
# A finisher is asked for so many seconds before the decode is expected to begin, or after this share of the steps where
# nothing is known: one may have to start first.
_ASK_FINISHER_S = 20.0
_ASK_FINISHER_AT = 0.8
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
        finisher: handle of the stage that finishes decoded videos, if there is one.
        finishing: options of that stage.
    """

    def __init__(
        self,
        encoder: DeploymentHandle,
        denoiser: DeploymentHandle,
        decoder: DeploymentHandle,
        low_noise_denoiser: DeploymentHandle | None = None,
        store_wait_s: float = 3600,
        finisher: DeploymentHandle | None = None,
        finishing: FinisherConfig | None = None,
    ) -> None:
        # `options` has a handle look for its replicas now, and not when the first job waits for it.
        self._encoder = encoder.options()
        self._denoiser = denoiser.options(stream=True)
        self._low_noise_denoiser = (low_noise_denoiser or denoiser).options(stream=True)
        self._decoder = decoder.options()
        self._store_wait_s = store_wait_s
        self._finisher = None if finisher is None else finisher.options(stream=True)
        self._finishing = finishing or FinisherConfig()
        self._decode_pace = Pace()
        self._finish_paces: dict[Any, Pace] = defaultdict(Pace)
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
        finishing = None
        if job.finish is not None and job.finish.steps:
            options = self._finishing
            request = FinishRequest(
                job.id, job.finish, job.params.format, job.prefix, {"id": job.id, **job.params.model_dump()}
            )
            finishing = Finishing(self._finisher, request, options.wait_s, options.progress_timeout_s)
        try:
            async with aclosing(self._run_stages(job, finishing)) as events:
                async for event in events:
                    yield event
        finally:
            if finishing is not None:
                finishing.cancel()

    async def _run_stages(self, job: JobSpec, finishing: Finishing | None) -> AsyncGenerator[Event, None]:
        params = job.params
        decode_s = self._decode_pace.seconds(params.format)
        finish_s = 0.0 if finishing is None else finishing.pace_of(self._finish_paces).seconds(finishing.made)
        started = time.monotonic()

        yield Progress("encode", 0, 1)
        encoded = self._encoder.encode.remote(params.prompt, params.negative_prompt if params.guided else None)
        denoising = _Denoising()
        async with aclosing(self._denoise(job, encoded, denoising, decode_s + finish_s)) as events:
            async for event in events:
                if finishing is not None and _begins_soon(event, decode_s + finish_s):
                    finishing.begin()
                yield event
        begun, latents = denoising.started, denoising.latents
        if begun is None or latents is None:
            raise JobFailed("no_latents", "the denoiser's stream ended without latents", retryable=True)

        yield Progress("decode", 0, 1, decode_s + finish_s if decode_s else None)
        decode_started = time.monotonic()
        decoded = await self._decode(latents, params, job, finishing)
        self._decode_pace.learn(time.monotonic() - decode_started, params.format)
        yield Progress("decode", 1, 1, finish_s)
        done = Done(
            outputs=decoded.outputs,
            timings={
                "encode": begun.encode_seconds,
                "denoise": denoising.seconds,
                "decode": decoded.timings["vae"],
                "store": decoded.timings["store"],
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
        if finishing is not None:
            async with aclosing(self._finish(finishing, finish_s)) as events:
                async for event in events:
                    yield event
            done = finishing.add_to(done, self._finishing.resources.num_gpus)
        yield replace(done, timings={**done.timings, "total": time.monotonic() - started})

    async def _finish(self, finishing: Finishing, finish_s: float) -> AsyncGenerator[Progress, None]:
        """Wait for the finisher, which has worked beside the decode, and yield its progress.

        Args:
            finishing: the call, whose frames have been sent.
            finish_s: estimated seconds that it takes longer than the decode; 0 if unknown.
        """
        began, frames = time.monotonic(), finishing.made.num_frames
        yield Progress("finish", 0, frames, finish_s or None)
        first: float | None = None
        async for share in finishing.follow():
            first = share if first is None else first
            seconds = time.monotonic() - began
            left = seconds * (1 - share) / (share - first) if share > first else finish_s or None
            yield Progress("finish", int(share * frames), frames, left)
        if finishing.finished is not None:
            finishing.pace_of(self._finish_paces).learn(time.monotonic() - began, finishing.made)
            yield Progress("finish", frames, frames, 0.0)

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

    async def _decode(self, latents: Any, params: Params, job: JobSpec, finishing: Finishing | None = None) -> Decoded:
        """Decode and store. Repeat that while the storage is away or full, and a few times if memory is short.

        Meanwhile the latents stay in this process: where a video cannot be stored, a state could not be saved either.
        Each try has a finisher of its own, which gets the frames as they are decoded.
        """
        until = time.monotonic() + self._store_wait_s
        pause_s, again = _STORE_AGAIN_S[0], False
        pauses = iter(_DECODE_AGAIN_S)
        while True:
            frames_to = None if finishing is None else await finishing.address()
            decoding = self._decoder.decode.remote(
                latents, params, job.prefix, job.id, again, this_process(), frames_to
            )
            try:
                decoded: Decoded = await decoding
                return decoded
            except RayActorError as error:
                raise JobFailed("decoder_lost", _LOST.format("decoder"), retryable=True) from error
            except RayTaskError as error:
                if finishing is not None:
                    finishing.cancel()
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


def _begins_soon(event: Progress, after_s: float) -> bool:
    """Return whether the decode begins soon, after which it takes `after_s` up to the video."""
    if event.stage != "denoise":
        return False
    if event.seconds_left is None:
        return event.step >= _ASK_FINISHER_AT * event.steps
    return event.seconds_left - after_s <= _ASK_FINISHER_S


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
