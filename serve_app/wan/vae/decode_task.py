"""One decode of a batch of videos: which tiles are left, and the pixels that they become.

A chunk's frames leave the device as bytes as soon as they are there: memory on the device does not grow with frames.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch

from serve_app.wan.vae.chunks import ChunkDecoder
from serve_app.wan.vae.device_copies import host_empty, record_event, synchronize
from serve_app.wan.vae.frame_buffer import FrameBuffer, PixelsNotFinite
from serve_app.wan.vae.tiles import Picture, Tile


class NoVideoWanted(Exception):
    """No video of the batch is wanted any more. `DecodeTask.errors` has the reasons.

    Raised in place of the reasons, because an exception keeps the tensors alive of the frames that it passes.
    """


class DecodeTask:
    """One decode of a batch of videos.

    Args:
        picture: cut into the tiles to decode.
        latents: `[samples, channels, frames, height, width]`.
        raw: make float32 pixels from -1 to 1 instead of bytes.
        frame_buffers: one for each sample.

    Attributes:
        result: `[samples, frames, height, width, 3]`, in host memory.
        done: decoded tiles, in the order in which they were finished.
    """

    def __init__(
        self, picture: Picture, latents: torch.Tensor, raw: bool, frame_buffers: Sequence[FrameBuffer]
    ) -> None:
        self.picture = picture
        self.done: list[Tile] = []
        self._chunks = latents.shape[2]
        self._dtype = latents.dtype
        self._convert = _to_floats if raw else _to_bytes
        pixels = picture.spans(picture.whole)[-1]
        shape = (len(latents), picture.frames(latents.shape[2]), pixels.rows[1], pixels.columns[1], 3)
        self.result = host_empty(shape, torch.float32 if raw else torch.uint8, latents.device)
        self._frame_buffers = frame_buffers
        self._lock = threading.Lock()
        self._frames_of: dict[Tile, int] = {}  # decoded frames of each tile
        for frame_buffer, video in zip(frame_buffers, self.result, strict=True):
            frame_buffer.begin(video.numpy())

    @property
    def errors(self) -> list[BaseException | None]:
        """Reason why each video has no frames; None if it has."""
        return [frame_buffer.error for frame_buffer in self._frame_buffers]

    def check_wanted(self) -> None:
        """Raise `NoVideoWanted` if no video is wanted any more."""
        if None not in self.errors:
            raise NoVideoWanted

    def plan(self, tiles: Iterable[Tile], instead: Tile | None = None) -> None:
        """Add tiles to those that have to be decoded, and remove `instead`."""
        with self._lock:
            if instead is not None:
                del self._frames_of[instead]
            self._frames_of.update(dict.fromkeys(tiles, 0))

    def run(self, decoder: ChunkDecoder, tile: Tile, features: Iterable[torch.Tensor]) -> None:
        """Decode one tile.

        Args:
            decoder: runs on the device that decodes the tile.
            tile: is one of those planned.
            features: features of whole pictures, as `ChunkDecoder.features` yields them.

        Raises:
            NoVideoWanted: no video of the batch is wanted any more.
        """
        self.check_wanted()
        spans = self.picture.spans(tile)
        view = self.result[:, :, slice(*spans[-1].rows), slice(*spans[-1].columns)]
        # A device copies without the host waiting for it only into contiguous memory.
        direct = decoder.device.type == "cpu" or view[0].is_contiguous()
        target = view if direct else host_empty(view.shape, view.dtype, decoder.device)
        # By chunk and sample. Looked at when the host waits for the chunk's bytes anyway.
        finite = host_empty((self._chunks, len(target)), torch.bool, decoder.device)
        begun = 0
        copying: tuple[int, slice, torch.cuda.Event | None] | None = None

        def finish_copy() -> None:
            if copying is None:
                return
            index, frames, event = copying
            if event is not None:
                event.synchronize()
            self._fail_if_not_finite(finite[index].tolist(), frames)
            if not direct:
                view[:, frames].copy_(target[:, frames])
            self._advance(tile, frames.stop)

        for index, chunk in enumerate(decoder.frames(features, spans)):
            finite[index].copy_(_are_finite(chunk), non_blocking=True)
            pixels = self._convert(chunk.permute(0, 2, 3, 4, 1))
            for video, sample in zip(target, pixels, strict=True):
                video[begun : begun + len(sample)].copy_(sample, non_blocking=True)
            # The device works on this chunk while the host waits for the copy of the one before.
            finish_copy()
            copying = index, slice(begun, begun + pixels.shape[1]), record_event(decoder.device)
            begun += pixels.shape[1]
            self.check_wanted()
        finish_copy()
        synchronize(decoder.device)
        self.done.append(tile)

    def _fail_if_not_finite(self, finite: list[bool], frames: slice) -> None:
        """Fail the videos whose new pixels are not finite numbers."""
        for frame_buffer, good in zip(self._frame_buffers, finite, strict=True):
            if not good:
                frame_buffer.fail(
                    PixelsNotFinite(
                        f"The decode stage made pixels that are not finite numbers, in frames {frames.start + 1} to "
                        f"{frames.stop} of {self.result.shape[1]} ({str(self._dtype).removeprefix('torch.')})."
                    )
                )

    def _advance(self, tile: Tile, frames: int) -> None:
        """Note that a tile has its first `frames` frames, and tell the frame buffers how many are whole."""
        with self._lock:
            self._frames_of[tile] = frames
            whole = min(self._frames_of.values())
        for frame_buffer in self._frame_buffers:
            frame_buffer.advance(whole)


def _are_finite(chunk: torch.Tensor) -> torch.Tensor:
    """Return for each sample whether all of its numbers are finite, on the device.

    Looks at the extremes, which NaN passes through: `isfinite` on every pixel would make copies of the chunk.
    """
    pixels = (1, 2, 3, 4)
    return chunk.amax(pixels).isfinite() & chunk.amin(pixels).isfinite()


def _to_bytes(chunk: torch.Tensor) -> torch.Tensor:
    """Convert from -1 … 1 to 0 … 255, rounded to the nearest."""
    return (chunk * 0.5 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8)


def _to_floats(chunk: torch.Tensor) -> torch.Tensor:
    return chunk.clamp(-1, 1).float()
