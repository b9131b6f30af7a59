"""Scaled latents to frames, on one device or several, in tiles that fit into their memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from diffusers import AutoencoderKLWan

from serve_app.compute import is_out_of_memory
from serve_app.errors import one_line
from serve_app.logs import get_logger
from serve_app.wan.vae.chunks import ChunkDecoder
from serve_app.wan.vae.decode_task import DecodeTask, NoVideoWanted
from serve_app.wan.vae.device_copies import synchronize, to_host
from serve_app.wan.vae.frame_buffer import FrameBuffer
from serve_app.wan.vae.tiles import Picture, Tile

logger = get_logger(__name__)

# Share of a GPU's free memory that a tile may take. The work space of convolutions comes out of the rest, and so does
# what the allocator loses to fragmentation: a whole 720p picture takes 1.2 times the bytes of `Picture.tile_bytes`, and
# the allocator 1.2 times that. Whole pictures with less left over are slower than tiles, see
# benchmarks/results/2026-11-26-a14b-2xh200.md.
_SHARE = 0.67
RETRY_LARGER_AFTER = 16
"""Number of decodes in a row that fit, after which larger tiles are tried again: memory may be free by then."""


class TiledDecoder:
    """Decoder on one or several devices, for one call at a time.

    Args:
        vaes: copies of one VAE, each on the device that it shall work on.
        max_tile_bytes: that a tile may take on a device, beside the weights. Infinity is what is free on a GPU, and no
            bound on CPUs.

    Attributes:
        levels: levels of the VAE, see `Level`.
        max_tile_bytes: the argument, or less since a tile has not fitted.
        tiles: tiles of the last decode, in the order in which they were finished.
    """

    def __init__(self, vaes: Sequence[AutoencoderKLWan], max_tile_bytes: float = math.inf) -> None:
        self._decoders = [ChunkDecoder(vae) for vae in vaes]
        # Threads that stay, because libraries keep handles and work space for each thread.
        self._threads = ThreadPoolExecutor(len(vaes), "tiles") if len(vaes) > 1 else None
        self.levels = self._decoders[0].levels
        self.max_tile_bytes = self._configured_bytes = max_tile_bytes
        self._fitted = 0  # decodes in a row that fit
        self.tiles: list[Tile] = []

    @torch.no_grad()
    def decode(
        self, latents: torch.Tensor, raw: bool = False, frame_buffers: Sequence[FrameBuffer] | None = None
    ) -> torch.Tensor:
        """Return the frames of a batch of latents.

        Stops between two chunks once no video of the batch is wanted any more.

        Args:
            latents: `[samples, channels, frames, height, width]`, scaled as the VAE wants them, on the first device.
            raw: make float32 pixels from -1 to 1, for comparisons.
            frame_buffers: one for each sample; it is told of the frames as they come, or of the error.

        Returns:
            `[samples, 4 * (frames - 1) + 1, 8 * height, 8 * width, 3]`, uint8 or float32, in host memory.

        Raises:
            PixelsNotFinite, or the error that a frame buffer was failed with: at least one sample has no frames. Raised
                when the other samples are done; their frame buffers have no error.
            MemoryError: not even the smallest tile fits.
        """
        height, width = latents.shape[-2:]
        picture = Picture(self.levels, height, width, len(latents), latents.element_size())
        task = DecodeTask(picture, latents, raw, frame_buffers or [FrameBuffer() for _ in latents])
        self.tiles = task.done
        if self._fitted >= RETRY_LARGER_AFTER:
            self.max_tile_bytes, self._fitted = min(self._configured_bytes, 2 * self.max_tile_bytes), 0
        bound = min([self.max_tile_bytes, *(_available_bytes(decoder.device) for decoder in self._decoders)])
        todo = deque(picture.tiles(bound, len(self._decoders)))
        task.plan(todo)
        try:
            self._run(task, todo, latents)
        except NoVideoWanted:
            pass
        else:
            self._fitted += 1
        for error in task.errors:
            if error is not None:
                raise error
        return task.result

    def _run(self, task: DecodeTask, todo: deque[Tile], latents: torch.Tensor) -> None:
        """Decode all tiles."""
        first = self._decoders[0]
        if len(todo) == 1:
            tile = todo.popleft()
            if not self._try_tile(task, first, tile, first.features(latents)):
                todo.extend(self._halve(task, tile))
        if todo:
            # In host memory, because all of them are needed until the last tile is done.
            features = []
            for feature in first.features(latents):
                features.append(to_host(feature))
                task.check_wanted()
            synchronize(first.device)
            if self._threads is None:
                self._work(task, first, todo, features)
            else:
                futures = [self._threads.submit(self._work, task, one, todo, features) for one in self._decoders]
                wait(futures)  # all of them, before anything is raised: the next call needs the devices for itself
                for future in futures:
                    future.result()

    @torch.no_grad()  # again, since each thread has its own setting
    def _work(self, task: DecodeTask, decoder: ChunkDecoder, todo: deque[Tile], features: list[torch.Tensor]) -> None:
        """Decode tiles until none is left."""
        while todo:
            try:
                tile = todo.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                # The bound may have sunk since the picture was cut.
                too_large = task.picture.tile_bytes(tile) > self.max_tile_bytes and tile.halves() is not None
                if too_large or not self._try_tile(task, decoder, tile, features):
                    todo.extendleft(self._halve(task, tile))
            except BaseException:
                todo.clear()  # the other threads need not go on
                raise

    def _try_tile(self, task: DecodeTask, decoder: ChunkDecoder, tile: Tile, features: Iterable[torch.Tensor]) -> bool:
        """Decode a tile. Return False if memory was short."""
        try:
            task.run(decoder, tile, features)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = one_line(error)
        else:
            return True
        # Behind the handler, because the exception keeps the tile's tensors alive.
        if decoder.device.type == "cuda":
            torch.cuda.empty_cache()
        self._fitted = -1  # becomes 0 at the end of this decode, which does not count
        logger.warning("a tile did not fit", extra={"rows": tile.rows, "columns": tile.columns, "error": reason})
        if halves := tile.halves():
            self.max_tile_bytes = min(self.max_tile_bytes, max(map(task.picture.tile_bytes, halves)))
        return False

    def _halve(self, task: DecodeTask, tile: Tile) -> tuple[Tile, Tile]:
        """Replace a tile that does not fit by its halves in the task, and return these.

        Raises:
            MemoryError: they would be too small.
        """
        halves = tile.halves()
        if halves is None:
            raise MemoryError(
                f"not even a tile of {tile.rows[1] - tile.rows[0]}x{tile.columns[1] - tile.columns[0]} latent pixels "
                f"fits, which takes about {task.picture.tile_bytes(tile) / 2**20:.0f} MiB"
            )
        task.plan(halves, instead=tile)
        return halves


def _available_bytes(device: torch.device) -> float:
    """Return the bytes that a tile may take on a device, however much others use of it."""
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - reserved
    return _SHARE * (min(free, allowed) + reserved - torch.cuda.memory_allocated(device))
