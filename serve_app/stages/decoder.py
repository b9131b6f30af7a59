"""The decoder's deployment: latents in, stored files out. Frames never leave the process."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import ray
from ray import serve

from serve_app.compute import MathThread, is_out_of_memory, limit_memory, pick_devices, settle
from serve_app.config import Config
from serve_app.errors import JobFailed, one_line
from serve_app.logs import get_logger
from serve_app.request import Params
from serve_app.storage import Storage, download_name
from serve_app.wan.arrival import Arrival

log = get_logger(__name__)

_Storing: TypeAlias = asyncio.Task[tuple[dict[str, str], int, float]]

SPRITES = (4, 16)
"""Columns of a spritesheet, and tiles."""


@dataclass(frozen=True)
class Decoded:
    """Where a video was stored: keys by `video`, `thumbnail`, `spritesheet`; the mp4's size; seconds by part; and the
    revision of the checkpoint."""

    outputs: dict[str, str]
    size_bytes: int
    timings: dict[str, float]
    revision: str


@dataclass
class _Item:
    """A call of `decode`.

    `again`: an earlier call may have left some of its files under `prefix`. `abandoned`: nobody wants the video now.
    """

    latents: np.ndarray
    params: Params
    prefix: str
    job_id: str
    again: bool
    abandoned: bool = False


@serve.deployment(name="Decoder")
class Decoder:
    """Loads the VAE and answers `decode`.

    Args:
        config: the deployment's configuration.
    """

    def __init__(self, config: Config) -> None:
        import torch

        from serve_app.wan.checkpoint import Checkpoint
        from serve_app.wan.vae import VideoDecoder

        stage = config.decoder
        started = time.monotonic()
        checkpoint = Checkpoint(config.model.folder, config.model.random)
        self._model_name = config.model.name
        self._revision = checkpoint.revision
        self._math = MathThread(stage.threads)
        own = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        device, *others = pick_devices(stage.device, stage.devices, own)
        for one in (device, *others):
            limit_memory(one, stage.memory_fraction)
        dtype, tile_bytes = getattr(torch, config.model.vae_dtype), stage.tile_memory_mib * 2**20
        self._decoder = self._math.call(VideoDecoder, checkpoint, device, dtype, others, tile_bytes)
        self._storage = Storage(config.storage_options)
        if stage.warmup:
            params = Params(**config.defaults.model_dump(), prompt="warm-up", seed=0)
            noise = np.zeros((1, checkpoint.vae_config["z_dim"], *params.latent_shape), dtype=np.float32)
            self._math.call(self._warm_up, noise, params)
            settle()
        self._decode_batch.set_max_batch_size(stage.batch.size)
        self._decode_batch.set_batch_wait_timeout_s(stage.batch.wait_s)
        log.info("decoder ready", extra={"seconds": round(time.monotonic() - started, 2)})

    async def decode(
        self, latents: np.ndarray, params: Params, prefix: str, job_id: str, again: bool = False
    ) -> Decoded:
        """Decode latents [1, channels, frames, height, width] and store the video under `prefix`.

        Args:
            again: an earlier call may have left some of its files there.

        Raises:
            JobFailed: `decode_failed`; `out_of_memory` if not even the smallest tile fits, which another replica may
                have room for, or this one later; or `store_failed`, which is retryable where the storage was away or
                full.
        """
        item = _Item(latents, params, prefix, job_id, again)
        try:
            result = await self._decode_batch(item)
        except asyncio.CancelledError:
            item.abandoned = True
            raise
        if isinstance(result, JobFailed):
            raise result
        storing, seconds = result
        try:
            outputs, size, stored = await storing  # which is cancelled with this call
        except Exception as error:
            log.exception("storing failed", extra={"job": job_id})
            raise JobFailed("store_failed", one_line(error), retryable=isinstance(error, OSError)) from None
        return Decoded(outputs, size, {"vae": seconds, "store": stored}, self._revision)

    @serve.batch
    async def _decode_batch(self, items: list[_Item]) -> list[tuple[_Storing, float] | JobFailed]:
        """Of each what stores it, and the seconds that decoding all took together.

        Latents of equal shape share a pass of the VAE, whose sums then differ in the last bits from those of each
        alone. A failure concerns its own item only. Files are written while frames come, but storing them is not waited
        for: the next batch is decoded meanwhile.
        """
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            by_shape[item.latents.shape].append(index)
        results: list[tuple[_Storing, float] | JobFailed] = [JobFailed("decode_failed", "not decoded")] * len(items)
        for indices in by_shape.values():
            started = time.monotonic()
            arrival = Arrival()
            decoded: asyncio.Future[float] = asyncio.get_running_loop().create_future()
            storing = [
                asyncio.create_task(self._store(items[index], arrival, place, decoded))
                for place, index in enumerate(indices)
            ]
            try:
                latents = np.concatenate([items[index].latents for index in indices])
                await self._math.run(self._frames, latents, arrival)
            except asyncio.CancelledError as error:
                arrival.fail(error)  # no thread may wait for ever
                decoded.cancel()
                raise
            except Exception as error:  # of our own type, because a process without torch cannot unpickle torch's
                log.exception("decoding failed", extra={"jobs": [items[index].job_id for index in indices]})
                short = is_out_of_memory(error)
                failure = JobFailed("out_of_memory" if short else "decode_failed", one_line(error), short)
                arrival.fail(failure)
                decoded.cancel()
                await asyncio.gather(*storing, return_exceptions=True)
                for index in indices:
                    results[index] = failure
                continue
            decoded.set_result(time.monotonic())
            seconds = time.monotonic() - started
            for index, task in zip(indices, storing, strict=True):
                results[index] = task, seconds
        return results

    def _frames(self, latents: np.ndarray, arrival: Arrival) -> np.ndarray:
        import torch

        return self._decoder.decode(torch.from_numpy(latents), arrival)

    async def _store(
        self, item: _Item, arrival: Arrival, place: int, decoded: asyncio.Future[float]
    ) -> tuple[dict[str, str], int, float]:
        """Write one video's files while its frames come, and put them where they belong.

        Args:
            place: of the video among those that are decoded together.
            decoded: when that was done.

        Returns:
            The keys of the files, the size of the mp4, and the seconds that this took beyond decoding.
        """
        from serve_app.wan.video import spritesheet, thumbnail, write_mp4

        metadata: dict[str, Any] = {"id": item.job_id, "model": self._model_name, "revision": self._revision}
        metadata.update(item.params.model_dump())

        def write(path: Path) -> None:
            write_mp4(arrival.frames()[place], path, item.params.fps, metadata, arrival.wait)

        with TemporaryDirectory(prefix="wan-serve-") as folder:
            path = Path(folder) / "video.mp4"
            writing = asyncio.create_task(asyncio.to_thread(write, path))
            try:
                began = await decoded
                if item.abandoned:
                    raise asyncio.CancelledError
                if item.again:
                    await self._storage.delete_prefix(item.prefix)
                outputs: dict[str, str] = {}
                frames = arrival.frames()[place]  # of which the encoder still has some to do
                small = await asyncio.to_thread(lambda: (thumbnail(frames), spritesheet(frames, *SPRITES)))
                await self._put(item, "thumbnail.jpg", small[0], outputs)
                await self._put(item, "spritesheet.jpg", small[1], outputs)
                await asyncio.shield(writing)
                # Last, so that whoever finds the video finds the rest too.
                await self._put(item, "video.mp4", path, outputs)
            finally:
                # A thread cannot be stopped, and wants its folder.
                await asyncio.gather(writing, return_exceptions=True)
            return outputs, path.stat().st_size, time.monotonic() - began

    async def _put(self, item: _Item, name: str, content: bytes | Path, outputs: dict[str, str]) -> None:
        """Store one of a video's files, and note its key."""
        key = f"{item.prefix}/{name}"
        await self._storage.put(key, content, download_name(item.job_id, key))
        outputs[name.partition(".")[0]] = key

    def _warm_up(self, latents: np.ndarray, params: Params) -> None:
        from serve_app.wan.video import spritesheet, thumbnail, write_mp4

        frames = self._frames(latents, Arrival())[0]
        with TemporaryDirectory(prefix="wan-serve-") as folder:
            write_mp4(frames, Path(folder) / "video.mp4", params.fps, {})
        thumbnail(frames)
        spritesheet(frames, *SPRITES)
