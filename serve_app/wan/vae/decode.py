"""Scaled latents to frames, on one device or several, in tiles that fit into their memory.

A chunk's frames leave the device as bytes as soon as they are there: memory on the device does not grow with frames.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from diffusers import AutoencoderKLWan

from serve_app.compute import is_out_of_memory
from serve_app.errors import one_line
from serve_app.logs import get_logger
from serve_app.wan.vae.chunks import Stream
from serve_app.wan.vae.frame_buffer import FrameBuffer, PixelsNotFinite
from serve_app.wan.vae.tiles import Picture, Tile

logger = get_logger(__name__)

# Of a GPU's free memory. The work space of convolutions comes out of the rest, and what the allocator holds in pieces:
# a whole 720p picture takes 1.2 times what `Picture.bytes` says, and the allocator 1.2 times that. A share that leaves
# less is slower than tiles are (benchmarks/results/2026-11-26-a14b-2xh200.md).
_SHARE = 0.67
MORE_AFTER = 16
"""Decodes in a row that fit, after which larger tiles are tried again: what was short may be there now."""


class _Ended(Exception):
    """No video of the call is wanted any more. `_TileTask.errors` has the reasons.

    Raised in place of those, because an exception keeps the tensors alive that it passes by.
    """


class TiledDecoder:
    """Decodes on one or several devices, one call at a time.

    Args:
        vaes: copies of one VAE, each on the device that it shall work on.
        most_bytes: that a tile may take on a device, beside the weights; infinity is what is free on a GPU, and no
            bound on CPUs.

    Attributes:
        levels: of the VAE.
        most_bytes: the same, or less since a tile has not fitted.
        tiles: those that the last decode was made of, in the order in which they were done.
    """

    def __init__(self, vaes: Sequence[AutoencoderKLWan], most_bytes: float = math.inf) -> None:
        self._streams = [Stream(vae) for vae in vaes]
        # Threads that stay, because libraries keep handles and work space for each.
        self._threads = ThreadPoolExecutor(len(vaes), "tiles") if len(vaes) > 1 else None
        self.levels = self._streams[0].levels
        self.most_bytes = self._given = most_bytes
        self._fitted = 0
        self.tiles: list[Tile] = []

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, raw: bool = False, arrivals: Sequence[FrameBuffer] | None = None
    ) -> torch.Tensor:
        """Return the frames of a batch of latents.

        Stops between two chunks once no video of the batch is wanted any more.

        Args:
            latents: `[samples, channels, frames, height, width]` as the VAE wants them, on the first device.
            raw: float32 from -1 to 1, for comparisons.
            arrivals: one for each sample, which is told of its frames as they come, and of why they do not.

        Returns:
            `[samples, 4 * (frames - 1) + 1, 8 * height, 8 * width, 3]`, uint8 or float32, in host memory.

        Raises:
            PixelsNotFinite, or what else an arrival was failed with: at least one sample has no frames. Raised when
                the others are done; their arrivals have no error.
            MemoryError: not even the smallest tile fits.
        """
        height, width = latents.shape[-2:]
        picture = Picture(self.levels, height, width, len(latents), latents.element_size())
        job = _TileTask(picture, latents, raw, arrivals or [FrameBuffer() for _ in latents])
        self.tiles = job.done
        if self._fitted >= MORE_AFTER:
            self.most_bytes, self._fitted = min(self._given, 2 * self.most_bytes), 0
        bound = min([self.most_bytes, *(_free(stream.device) for stream in self._streams)])
        todo = deque(picture.tiles(bound, len(self._streams)))
        job.plan(todo)
        try:
            self._run(job, todo, latents)
        except _Ended:
            pass
        else:
            self._fitted += 1
        for error in job.errors:
            if error is not None:
                raise error
        return job.result

    def _run(self, job: _TileTask, todo: deque[Tile], latents: torch.Tensor) -> None:
        """Do all tiles."""
        first = self._streams[0]
        if len(todo) == 1:
            tile = todo.popleft()
            if not self._fits(job, first, tile, first.features(latents)):
                todo.extend(self._smaller(job, tile))
        if todo:
            # In host memory, because they are all needed until the last tile is done.
            features = []
            for feature in first.features(latents):
                features.append(_to_host(feature))
                job.check()
            _finish(first.device)
            if self._threads is None:
                self._work(job, first, todo, features)
            else:
                futures = [self._threads.submit(self._work, job, stream, todo, features) for stream in self._streams]
                wait(futures)  # all of them, before anything is raised: the next call wants the devices for itself
                for future in futures:
                    future.result()

    @torch.no_grad()  # which is a property of the thread
    def _work(self, job: _TileTask, stream: Stream, todo: deque[Tile], features: list[torch.Tensor]) -> None:
        """Do tiles until none is left."""
        while todo:
            try:
                tile = todo.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                # The bound may have sunk since the picture was cut.
                hopeless = job.picture.bytes(tile) > self.most_bytes and tile.halves() is not None
                if hopeless or not self._fits(job, stream, tile, features):
                    todo.extendleft(self._smaller(job, tile))
            except BaseException:
                todo.clear()  # for nothing
                raise

    def _fits(self, job: _TileTask, stream: Stream, tile: Tile, features: Iterable[torch.Tensor]) -> bool:
        """Do a tile; False if memory was short."""
        try:
            job.run(stream, tile, features)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = one_line(error)
        else:
            return True
        # Not in the handler: the exception keeps the tile's tensors alive.
        if stream.device.type == "cuda":
            torch.cuda.empty_cache()
        self._fitted = -1  # this decode does not count
        logger.warning("a tile did not fit", extra={"rows": tile.rows, "columns": tile.columns, "error": reason})
        if halves := tile.halves():
            self.most_bytes = min(self.most_bytes, max(map(job.picture.bytes, halves)))
        return False

    def _smaller(self, job: _TileTask, tile: Tile) -> tuple[Tile, Tile]:
        """The halves of a tile that does not fit, which the job then wants instead.

        Raises:
            MemoryError: they would be too small.
        """
        halves = tile.halves()
        if halves is None:
            raise MemoryError(
                f"not even a tile of {tile.rows[1] - tile.rows[0]}x{tile.columns[1] - tile.columns[0]} latent pixels "
                f"fits, which takes about {job.picture.bytes(tile) / 2**20:.0f} MiB"
            )
        job.plan(halves, instead=tile)
        return halves


class _TileTask:
    """One call: what is decoded, and where its pixels go."""

    def __init__(self, picture: Picture, latents: torch.Tensor, raw: bool, arrivals: Sequence[FrameBuffer]) -> None:
        self.picture = picture
        self.done: list[Tile] = []
        self._chunks = latents.shape[2]
        self._dtype = latents.dtype
        self._convert = _floats if raw else _levels
        dtype = torch.float32 if raw else torch.uint8
        pixels = picture.spans(picture.whole)[-1]
        shape = (len(latents), picture.frames(latents.shape[2]), pixels.rows[1], pixels.columns[1], 3)
        self.result = _on_host(shape, dtype, latents.device)
        self._arrivals = arrivals
        self._planned = threading.Lock()
        self._there: dict[Tile, int] = {}
        """Frames of each tile."""
        for arrival, video in zip(arrivals, self.result, strict=True):
            arrival.begin(video.numpy())

    @property
    def errors(self) -> list[BaseException | None]:
        """Why each video has no frames; None where it has."""
        return [arrival.error for arrival in self._arrivals]

    def check(self) -> None:
        """Raise `_Ended` if no video is wanted any more."""
        if None not in self.errors:
            raise _Ended

    def plan(self, tiles: Iterable[Tile], instead: Tile | None = None) -> None:
        """These have to be done, and `instead` no longer."""
        with self._planned:
            if instead is not None:
                del self._there[instead]
            self._there.update(dict.fromkeys(tiles, 0))

    def run(self, stream: Stream, tile: Tile, features: Iterable[torch.Tensor]) -> None:
        """Decode one tile."""
        self.check()
        spans = self.picture.spans(tile)
        view = self.result[:, :, slice(*spans[-1].rows), slice(*spans[-1].columns)]
        # Only into contiguous memory can a device copy without being waited for.
        direct = stream.device.type == "cpu" or view[0].is_contiguous()
        target = view if direct else _on_host(view.shape, view.dtype, stream.device)
        # Of each chunk and sample. Judged where the host waits for the chunk's bytes anyway.
        finite = _on_host((self._chunks, len(target)), torch.bool, stream.device)
        begun = 0
        copying: tuple[int, slice, torch.cuda.Event | None] | None = None

        def arrived() -> None:
            if copying is None:
                return
            index, frames, event = copying
            if event is not None:
                event.synchronize()
            self._judge(finite[index].tolist(), frames)
            if not direct:
                view[:, frames].copy_(target[:, frames])
            self._tell(tile, frames.stop)

        for index, chunk in enumerate(stream.frames(features, spans)):
            finite[index].copy_(_are_finite(chunk), non_blocking=True)
            pixels = self._convert(chunk.permute(0, 2, 3, 4, 1))
            for video, sample in zip(target, pixels, strict=True):
                video[begun : begun + len(sample)].copy_(sample, non_blocking=True)
            # The device has the next chunk to do while the host waits for the copy of the last.
            arrived()
            copying = index, slice(begun, begun + pixels.shape[1]), _event(stream.device)
            begun += pixels.shape[1]
            self.check()
        arrived()
        _finish(stream.device)
        self.done.append(tile)

    def _judge(self, finite: list[bool], frames: slice) -> None:
        """Fail the videos whose new pixels are not finite numbers."""
        for arrival, good in zip(self._arrivals, finite, strict=True):
            if not good:
                arrival.fail(
                    PixelsNotFinite(
                        f"The decode stage made pixels that are not finite numbers, in frames {frames.start + 1} to "
                        f"{frames.stop} of {self.result.shape[1]} ({str(self._dtype).removeprefix('torch.')})."
                    )
                )

    def _tell(self, tile: Tile, frames: int) -> None:
        with self._planned:
            self._there[tile] = frames
            whole = min(self._there.values())
        for arrival in self._arrivals:
            arrival.advance(whole)


def _are_finite(chunk: torch.Tensor) -> torch.Tensor:
    """Return for each sample whether all of its numbers are finite, on the device.

    By the extremes, which NaN passes through, because `isfinite` on every pixel would make copies of the chunk.
    """
    pixels = (1, 2, 3, 4)
    return chunk.amax(pixels).isfinite() & chunk.amin(pixels).isfinite()


def _levels(chunk: torch.Tensor) -> torch.Tensor:
    """From -1 … 1 to 0 … 255, rounded to the nearest."""
    return (chunk * 0.5 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8)


def _floats(chunk: torch.Tensor) -> torch.Tensor:
    return chunk.clamp(-1, 1).float()


def _on_host(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory that a device can copy to and from by itself."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def _to_host(x: torch.Tensor) -> torch.Tensor:
    return x if x.device.type == "cpu" else _on_host(x.shape, x.dtype, x.device).copy_(x, non_blocking=True)


def _event(device: torch.device) -> torch.cuda.Event | None:
    """What the device reaches when it has done what it was given so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _finish(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _free(device: torch.device) -> float:
    """Bytes that a decode may take there, whoever else uses the device."""
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - reserved
    return _SHARE * (min(free, allowed) + reserved - torch.cuda.memory_allocated(device))
