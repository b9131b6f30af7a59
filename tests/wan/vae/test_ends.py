"""A decode that ends early: its pixels are not finite numbers, or nobody wants them any more."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.wan.vae.frame_buffer import Abandoned, FrameBuffer, PixelsNotFinite
from serve_app.wan.vae.tiled_decoder import TiledDecoder
from tests.wan.vae.test_tiles import noise, small

LAYOUTS = pytest.mark.parametrize(
    ("devices", "max_tile_bytes"), [(1, math.inf), (1, 1), (2, 1)], ids=["whole", "tiles", "two devices"]
)
CHUNKS = 4


def decoder_of(devices: int, max_tile_bytes: float) -> TiledDecoder:
    one = small()
    return TiledDecoder([one, *(copy.deepcopy(one) for _ in range(devices - 1))], max_tile_bytes)


def latents(samples: int = 1) -> torch.Tensor:
    return noise(samples, 16, CHUNKS, 8, 34)


class Chunks:
    """Counter of the chunks of a decoder's tiles, which also spoils one number in one of them.

    Args:
        tile: index of the spoilt tile, in the order in which they begin.
        chunk: index of the spoilt chunk in that tile.
        sample: index of the spoilt video in the batch.
        poison: the number that is put in.
    """

    def __init__(
        self, decoder: TiledDecoder, tile: int = -1, chunk: int = 0, sample: int = 0, poison: float = math.nan
    ) -> None:
        self.count, self.tiles = 0, 0
        self._lock = threading.Lock()
        self._where = tile, chunk, sample, poison
        for stream in decoder._decoders:
            stream.frames = self._wrap(stream.frames)  # type: ignore[method-assign]

    def _wrap(self, frames: Any) -> Any:
        def wrapped(features: Any, spans: Any) -> Iterator[torch.Tensor]:
            with self._lock:
                mine, self.tiles = self.tiles, self.tiles + 1
            tile, chunk, sample, poison = self._where
            for index, pixels in enumerate(frames(features, spans)):
                with self._lock:
                    self.count += 1
                if (mine, index) == (tile, chunk):
                    pixels = pixels.clone()
                    pixels[sample, 1, -1, 3, 5] = poison
                yield pixels

        return wrapped


@LAYOUTS
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("chunk", [0, CHUNKS - 1], ids=["first chunk", "last chunk"])
def test_one_number_that_is_not_finite_is_found(devices: int, max_tile_bytes: float, poison: float, chunk: int) -> None:
    decoder, frame_buffer = decoder_of(devices, max_tile_bytes), FrameBuffer()
    Chunks(decoder, tile=0 if max_tile_bytes > 1 else 2, chunk=chunk, poison=poison)
    where = "frames 1 to 1 of 13" if chunk == 0 else "frames 10 to 13 of 13"
    with pytest.raises(PixelsNotFinite, match=where):
        decoder.decode(latents(), frame_buffers=[frame_buffer])
    assert isinstance(frame_buffer.error, PixelsNotFinite)
    with pytest.raises(PixelsNotFinite, match="decode stage"):
        frame_buffer.wait(12)


def test_one_number_is_also_found_where_nobody_reads_along() -> None:
    decoder = decoder_of(1, math.inf)
    Chunks(decoder, tile=0, chunk=1)
    with pytest.raises(PixelsNotFinite):
        decoder.decode(latents())
    assert np.isfinite(decoder.decode(latents(), raw=True).numpy()).all(), "the next decode is another one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_and_weights_that_are_not_finite_show_in_the_pixels(dtype: torch.dtype) -> None:
    bad = latents().to(dtype)
    bad[0, 3, 2, 4, 20] = math.nan
    with pytest.raises(PixelsNotFinite, match=str(dtype).removeprefix("torch.")):
        TiledDecoder([small(fast=False).to(dtype)], max_tile_bytes=1).decode(bad)
    vae = small(fast=False).to(dtype)
    vae.decoder.conv_out.bias.data[1] = math.nan
    with pytest.raises(PixelsNotFinite):
        TiledDecoder([vae]).decode(latents().to(dtype))


@LAYOUTS
def test_batch_mates_of_a_video_that_is_not_finite_have_their_frames(devices: int, max_tile_bytes: float) -> None:
    expected = decoder_of(devices, max_tile_bytes).decode(latents(3)).numpy()
    decoder, frame_buffers = decoder_of(devices, max_tile_bytes), [FrameBuffer() for _ in range(3)]
    Chunks(decoder, tile=0, chunk=1, sample=1)
    with pytest.raises(PixelsNotFinite):
        decoder.decode(latents(3), frame_buffers=frame_buffers)
    assert [type(frame_buffer.error) for frame_buffer in frame_buffers] == [type(None), PixelsNotFinite, type(None)]
    for index in (0, 2):
        frame_buffers[index].wait(12)
        assert np.array_equal(frame_buffers[index].frames(), expected[index])


def test_black_is_a_colour() -> None:
    vae = small()
    vae.decoder.conv_out.weight.data.zero_()
    vae.decoder.conv_out.bias.data.fill_(-3)
    assert not TiledDecoder([vae]).decode(latents()).any()


class Leaving(FrameBuffer):
    """Frames whose reader leaves as soon as the first ones are there."""

    def advance(self, whole: int) -> None:
        super().advance(whole)
        self.fail(Abandoned())


@LAYOUTS
def test_a_decode_that_nobody_wants_stops_between_chunks_on_every_device(devices: int, max_tile_bytes: float) -> None:
    decoder = decoder_of(devices, max_tile_bytes)
    chunks = Chunks(decoder)
    with pytest.raises(Abandoned):
        decoder.decode(latents(), frame_buffers=[Leaving()])
    # On each device the chunk that was announced and the one under way; another device may have begun one more.
    assert chunks.count <= 2 * devices + (devices - 1)
    assert not decoder.tiles
    assert decoder.decode(latents()).any()


def test_a_decode_that_was_given_up_before_it_began_does_nothing() -> None:
    decoder, frame_buffer = decoder_of(1, math.inf), FrameBuffer()
    chunks = Chunks(decoder)
    frame_buffer.fail(Abandoned())
    with pytest.raises(Abandoned):
        decoder.decode(latents(), frame_buffers=[frame_buffer])
    assert chunks.count == 0


def test_batch_mates_of_a_video_that_nobody_wants_go_on() -> None:
    expected = decoder_of(1, 1).decode(latents(2)).numpy()
    staying = FrameBuffer()
    with pytest.raises(Abandoned):
        decoder_of(1, 1).decode(latents(2), frame_buffers=[Leaving(), staying])
    staying.wait(12)
    assert staying.error is None and np.array_equal(staying.frames(), expected[1])


def test_the_first_reason_stands() -> None:
    frame_buffer = FrameBuffer()
    frame_buffer.fail(Abandoned())
    frame_buffer.fail(PixelsNotFinite("later"))
    assert isinstance(frame_buffer.error, Abandoned)
