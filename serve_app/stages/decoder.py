"""The decoder's deployment: latents in, stored files out. Frames leave the process only on their way to a finisher."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import ray
from ray import serve

from serve_app.compute import MathThread, is_out_of_memory, limit_memory, pick_devices, settle
from serve_app.config import Config
from serve_app.errors import JobFailed, one_line
from serve_app.logs import get_logger
from serve_app.metrics import export
from serve_app.request import Params
from serve_app.stages.client_liveness import ClientLiveness
from serve_app.stages.frame_stream import FrameAddress, send_frames
from serve_app.stages.stage_memory import StageMemory
from serve_app.stages.status_board import StatusBoard
from serve_app.stages.video_files import StoredVideo, VideoFiles, warm_up
from serve_app.storage import Storage
from serve_app.wan.vae.frame_buffer import Abandoned, FrameBuffer, PixelsNotFinite

logger = get_logger(__name__)

_Storing: TypeAlias = asyncio.Task[StoredVideo]
_Stored: TypeAlias = tuple[_Storing, float]
"""The task that stores a video, and the seconds that decoding took."""


@dataclass(frozen=True)
class Decoded:
    """A video that was decoded and stored.

    Attributes:
        outputs: storage keys of `video`, `thumbnail` and `spritesheet`.
        size_bytes: size of the mp4.
        timings: seconds by part.
        revision: the checkpoint's.
        warnings: sentences for the user.
    """

    outputs: dict[str, str]
    size_bytes: int
    timings: dict[str, float]
    revision: str
    warnings: list[str] = field(default_factory=list)


@dataclass
class _Item:
    """A call of `decode`, while it lasts.

    Attributes:
        again: whether an earlier call may have left files under `prefix`.
        frames_to: a finisher that gets the frames as well.
        abandoned: whether the call was cancelled.
        frame_buffer: the frames that its latest pass of the VAE makes.
        decoded: done when all frames of that pass are there; the moment, on the monotonic clock.
        storing: what stores the frames of that pass.
        sending: what sends them to the finisher.
        result: what `_decode_batch` returns for it.
        warnings: sentences for the user.
    """

    latents: np.ndarray
    params: Params
    prefix: str
    job_id: str
    again: bool
    frames_to: FrameAddress | None = None
    abandoned: bool = False
    frame_buffer: FrameBuffer = field(default_factory=FrameBuffer)
    decoded: asyncio.Future[float] | None = None
    storing: _Storing | None = None
    sending: asyncio.Task[None] | None = None
    result: _Stored | JobFailed | None = None
    warnings: list[str] = field(default_factory=list)

    async def end(self) -> None:
        """End the decode before its next chunk, stop storing, and wait until nothing works on the video any more."""
        self.frame_buffer.fail(Abandoned())
        if self.storing is not None:
            self.storing.cancel()
            await asyncio.wait([self.storing])
        await self.sent()

    async def sent(self) -> None:
        """Wait until the finisher, if there is one, has all frames or will get no more."""
        if self.sending is not None:
            await asyncio.wait([self.sending])


@serve.deployment(name="Decoder")
class Decoder:
    """Loads the VAE and answers `decode`.

    Args:
        config: the deployment's configuration.
    """

    def __init__(self, config: Config) -> None:
        import torch

        from serve_app.wan.vae.decoder import VideoDecoder
        from serve_app.wan.weights.checkpoint import Checkpoint

        stage = config.decoder
        started = time.monotonic()
        checkpoint = Checkpoint(config.model.folder, config.model.random)
        self._model_name = config.model.name
        self._revision = checkpoint.revision
        self._math = MathThread(stage.threads)
        own = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        device, *others = pick_devices(stage.device, stage.devices, own)
        for each in (device, *others):
            limit_memory(each, stage.memory_fraction)
        dtype, tile_bytes = getattr(torch, config.model.vae_dtype), stage.tile_memory_mib * 2**20
        self._dtype = config.model.vae_dtype
        self._decoder = self._math.call(VideoDecoder, checkpoint, device, dtype, others, tile_bytes)
        self._storage = Storage(config.storage_options)
        self._client_liveness = ClientLiveness()
        export.start("decoder")
        self._videos = self._stopped = self._repeated = 0
        if stage.warmup:
            params = Params(**config.defaults.model_dump(), prompt="warm-up", seed=0)
            noise = np.zeros((1, checkpoint.vae_config["z_dim"], *params.latent_shape), dtype=np.float32)
            self._math.call(self._warm_up, noise, params)
            settle()
        vaes = self._decoder.vaes
        self._memory = StageMemory("decoder", config, checkpoint, [device, *others], vaes)
        self._board = StatusBoard(self.status)
        self._decode_batch.set_max_batch_size(stage.batch.size)
        self._decode_batch.set_batch_wait_timeout_s(stage.batch.wait_s)
        logger.info("decoder ready", extra={"seconds": round(time.monotonic() - started, 2)})

    async def decode(
        self,
        latents: np.ndarray,
        params: Params,
        prefix: str,
        job_id: str,
        again: bool = False,
        caller: Any = None,
        frames_to: FrameAddress | None = None,
    ) -> Decoded:
        """Decode latents [1, channels, frames, height, width] and store the video under `prefix`.

        Cancelling the call, or the death of its caller, ends the work on it before the next chunk of frames, and
        leaves nothing under `prefix`.

        Args:
            latents: float32.
            params: what they were made from.
            prefix: storage folder of the files.
            job_id: the job, for metadata and logs.
            again: whether an earlier call may have left files under `prefix`; they are removed.
            caller: handle of the process that asks, see `client_liveness`.
            frames_to: a finisher that gets the frames as they are decoded. What becomes of them there does not matter
                here.

        Raises:
            JobFailed: `decode_failed`; `not_finite` if latents or pixels hold NaN or infinity; `out_of_memory` if not
                even the smallest tile fits, although it may fit on another replica, or here later; or `store_failed`,
                which is retryable where the storage was away or full.
        """
        item = _Item(latents, params, prefix, job_id, again, frames_to)
        with self._client_liveness.watching(caller):
            try:
                result = await self._decode_batch(item)
                if isinstance(result, JobFailed):
                    raise result
                storing, seconds = result
                stored = await storing
                await item.sent()
            except asyncio.CancelledError:
                item.abandoned = True
                await item.end()
                logger.info("decode ended early", extra={"job": job_id})
                raise
            except JobFailed:
                raise
            except Exception as error:
                logger.exception("storing failed", extra={"job": job_id})
                raise JobFailed("store_failed", one_line(error), retryable=isinstance(error, OSError)) from None
        timings = {"vae": seconds, "store": stored.seconds}
        return Decoded(stored.outputs, stored.size_bytes, timings, self._revision, item.warnings)

    async def describe(self) -> dict[str, int]:
        """Return how many decodes began (`videos`), were `stopped` before their end, and `repeated` in float32."""
        return {"videos": self._videos, "stopped": self._stopped, "repeated": self._repeated}

    def status(self) -> dict[str, Any]:
        """Return the replica's status for people; called from another thread."""
        counts = {"videos": self._videos, "stopped": self._stopped, "repeated": self._repeated}
        return {**self._memory.plain(), **counts}

    @serve.batch
    async def _decode_batch(self, items: list[_Item]) -> list[_Stored | JobFailed]:
        """Decode videos, and return for each the task that stores it and the seconds that decoding all of them took.

        Latents of equal shape share a pass of the VAE; its sums differ in the last bits from those of a video alone. A
        failed or cancelled call concerns its own item only. Files are written while frames come, and the next batch is
        decoded while they are stored.
        """
        by_shape: dict[tuple[int, ...], list[_Item]] = defaultdict(list)
        for item in items:
            if np.isfinite(item.latents).all():
                by_shape[item.latents.shape].append(item)
            else:
                item.result = JobFailed("not_finite", "The latents that came to the decode stage are not finite.")
        for alike in by_shape.values():
            await self._pass(alike)
        # A video that was abandoned before its pass has no result, and nobody waits for one.
        return [item.result or JobFailed("decode_failed", "not decoded") for item in items]

    async def _pass(self, items: list[_Item], in_float32: bool = False) -> None:
        """Decode videos of equal shape together, and set the `result` of each that is still wanted.

        Videos whose pixels are not finite numbers are decoded once more in float32, if this was a smaller type.
        """
        items = [item for item in items if not item.abandoned]
        if not items:
            return
        self._videos += 0 if in_float32 else len(items)
        started = time.monotonic()
        for item in items:
            item.frame_buffer, item.decoded = FrameBuffer(), asyncio.get_running_loop().create_future()
            item.storing = asyncio.create_task(self._files(item).store(item.frame_buffer, item.decoded))
            if item.frames_to is not None:
                item.sending = asyncio.create_task(_send(item, item.frames_to))
        try:
            latents = np.concatenate([item.latents for item in items])
            await self._math.run(self._decode_frames, latents, [item.frame_buffer for item in items], in_float32)
        except asyncio.CancelledError:
            for item in items:
                await item.end()
            raise
        except (Abandoned, PixelsNotFinite):
            pass  # the frame buffer of each such video says so too; the other videos are there
        except Exception as error:
            logger.exception("decoding failed", extra={"jobs": [item.job_id for item in items]})
            # Passed on as our own type, because a process without torch cannot unpickle torch's.
            short = is_out_of_memory(error)
            for item in items:
                item.frame_buffer.fail(JobFailed("out_of_memory" if short else "decode_failed", one_line(error), short))
        not_finite = await self._set_results(items, time.monotonic() - started)
        if self._dtype != "float32" and not in_float32:
            for item in not_finite:
                item.warnings.append(
                    f"In {self._dtype} (model.vae_dtype) the pixels were not finite numbers, so the video was decoded "
                    "again in float32."
                )
            self._repeated += len(not_finite)
            await self._pass(not_finite, in_float32=True)

    async def _set_results(self, items: list[_Item], seconds: float) -> list[_Item]:
        """Set the result of each video of a pass that took so long. Returns those whose pixels are not finite."""
        not_finite = []
        for item in items:
            assert item.decoded is not None and item.storing is not None
            if (reason := item.frame_buffer.error) is None:
                item.decoded.set_result(time.monotonic())
                item.result = item.storing, seconds
                continue
            await item.end()
            self._stopped += item.abandoned
            if isinstance(reason, PixelsNotFinite):
                logger.error("pixels are not finite", extra={"job": item.job_id, "error": str(reason)})
                not_finite.append(item)
            item.result = reason if isinstance(reason, JobFailed) else JobFailed("not_finite", str(reason))
        return not_finite

    def _decode_frames(
        self, latents: np.ndarray, frame_buffers: list[FrameBuffer], in_float32: bool = False
    ) -> np.ndarray:
        import torch

        # Loaded for this pass alone: it is rare, and its weights take memory that larger tiles could use.
        decoder = self._decoder.in_float32() if in_float32 else self._decoder
        return decoder.decode(torch.from_numpy(latents), frame_buffers)

    def _files(self, item: _Item) -> VideoFiles:
        metadata: dict[str, Any] = {"id": item.job_id, "model": self._model_name, "revision": self._revision}
        metadata.update(item.params.model_dump())
        return VideoFiles(self._storage, item.prefix, item.job_id, item.params.fps, metadata, item.again)

    def _warm_up(self, latents: np.ndarray, params: Params) -> None:
        frame_buffer = FrameBuffer()
        try:
            self._decode_frames(latents, [frame_buffer])
        except PixelsNotFinite as error:  # that may be due to the zeros, so the replica starts all the same
            logger.error("the warm-up's pixels are not finite: this VAE may be damaged", extra={"error": str(error)})
        warm_up(frame_buffer.frames(), params.fps)


async def _send(item: _Item, address: FrameAddress) -> None:
    """Send the frames of an item's latest pass to a finisher. If it is gone, the plain video is all there will be."""
    frame_buffer = item.frame_buffer

    def send() -> None:
        send_frames(address, frame_buffer.frames(), frame_buffer.wait)

    try:
        await asyncio.to_thread(send)
    except Exception as error:
        logger.warning("frames not sent", extra={"job": item.job_id, "error": one_line(error)})
