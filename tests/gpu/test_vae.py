"""A decode on devices with memory of their own: what it takes of it, and what it does when there is too little."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from serve_app.wan.vae.frame_buffer import Abandoned, FrameBuffer, PixelsNotFinite
from serve_app.wan.vae.tiled_decoder import TiledDecoder
from serve_app.wan.vae.tiles import Picture
from tests.wan.vae.test_ends import Chunks, Leaving
from tests.wan.vae.test_frame_buffer import Watched

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HEIGHT, WIDTH = 60, 104


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Float32 all the way: TF32 rounds what goes into a convolution."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    with torch.device("cuda", 0):
        return AutoencoderKLWan(base_dim=32).eval()


def noise(chunks: int = 3) -> torch.Tensor:
    latents = torch.randn(1, 16, chunks, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    return latents.to("cuda:0")


def peak(decoder: TiledDecoder, latents: torch.Tensor) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    decoder.decode(latents)
    return torch.cuda.max_memory_allocated() - before


def test_frames_are_those_of_diffusers(vae: AutoencoderKLWan) -> None:
    expected = vae.decode(noise(), return_dict=False)[0].permute(0, 2, 3, 4, 1).cpu()
    assert (TiledDecoder([vae]).decode(noise(), raw=True) - expected).norm() <= 1e-5 * expected.norm()


def test_tiles_are_the_whole_picture(vae: AutoencoderKLWan) -> None:
    whole, tiled = TiledDecoder([vae]), TiledDecoder([vae], max_tile_bytes=400 * 2**20)
    expected, got = whole.decode(noise(), raw=True), tiled.decode(noise(), raw=True)
    assert len(whole.tiles) == 1 and len(tiled.tiles) > 4
    assert (got - expected).norm() <= 1e-4 * expected.norm()
    assert (whole.decode(noise()).int() - tiled.decode(noise()).int()).abs().max() <= 1


@pytest.mark.parametrize("max_tile_bytes", [math.inf, 1], ids=["whole", "tiles"])
def test_what_is_told_to_be_there_is_there(vae: AutoencoderKLWan, max_tile_bytes: float) -> None:
    watched = Watched()
    frames = TiledDecoder([vae], max_tile_bytes).decode(noise()[..., :16, :32], frame_buffers=[watched]).numpy()
    assert {1, 5, 9} <= {len(seen) for seen in watched.seen}
    assert all(np.array_equal(seen, frames[0, : len(seen)]) for seen in watched.seen)


@pytest.mark.parametrize("max_tile_bytes", [math.inf, 1], ids=["whole", "tiles"])
@pytest.mark.parametrize("chunk", [0, 2])
def test_one_number_that_is_not_finite_is_found(vae: AutoencoderKLWan, max_tile_bytes: float, chunk: int) -> None:
    small = noise()[..., :16, :32].repeat(2, 1, 1, 1, 1)
    expected = TiledDecoder([vae], max_tile_bytes).decode(small).numpy()
    decoder, arrivals = TiledDecoder([vae], max_tile_bytes), [FrameBuffer(), FrameBuffer()]
    Chunks(decoder, tile=0, chunk=chunk, sample=1)
    with pytest.raises(PixelsNotFinite, match="frames 1 to 1 of 9" if chunk == 0 else "frames 6 to 9 of 9"):
        decoder.decode(small, frame_buffers=arrivals)
    arrivals[0].wait(8)
    assert arrivals[0].error is None and np.array_equal(arrivals[0].frames(), expected[0])


@pytest.mark.parametrize("max_tile_bytes", [math.inf, 1], ids=["whole", "tiles"])
def test_a_decode_that_nobody_wants_stops_between_chunks(vae: AutoencoderKLWan, max_tile_bytes: float) -> None:
    decoder = TiledDecoder([vae], max_tile_bytes)
    chunks, latents = Chunks(decoder), noise(8)[..., :16, :16]
    first = Leaving()
    with pytest.raises(Abandoned):
        decoder.decode(latents, frame_buffers=[first])
    least = 0 if max_tile_bytes == math.inf else 8 * (len(Picture(decoder.levels, 16, 16).tiles(1)) - 1)
    assert chunks.count <= least + 2, "frames of the last tile are the first that are told of"
    assert decoder.decode(latents).any()


def test_memory_is_as_planned_and_does_not_grow_with_frames(vae: AutoencoderKLWan) -> None:
    for bound in (float("inf"), 800 * 2**20):
        decoder = TiledDecoder([vae], bound)
        few, many = peak(decoder, noise(4)), peak(decoder, noise(12))
        planned = max(map(Picture(decoder.levels, HEIGHT, WIDTH).tile_bytes, decoder.tiles))
        assert many - few <= 4 * noise(8).nbytes
        # Convolutions take work space beside it.
        assert 0.9 * planned <= few <= 1.5 * planned


def test_what_does_not_fit_is_cut_and_the_next_decode_begins_with_what_did(vae: AutoencoderKLWan) -> None:
    expected = TiledDecoder([vae]).decode(noise()).int()
    decoder = TiledDecoder([vae])
    picture = Picture(decoder.levels, HEIGHT, WIDTH)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + 0.6 * picture.tile_bytes(picture.whole)
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        first = decoder.decode(noise()).int()
        bound, tiles = decoder.max_tile_bytes, len(decoder.tiles)
        second = decoder.decode(noise()).int()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tiles > 1 and (len(decoder.tiles), decoder.max_tile_bytes) == (tiles, bound)
    assert max((first - expected).abs().max(), (second - expected).abs().max()) <= 1


def test_where_not_even_the_smallest_tile_fits_the_decode_fails_and_the_device_is_free(vae: AutoencoderKLWan) -> None:
    decoder = TiledDecoder([vae])
    torch.cuda.empty_cache()
    before, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    # Room for the middle block on whole pictures, but not for a tile.
    allowed = torch.cuda.memory_reserved() + 48 * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        with pytest.raises((MemoryError, torch.OutOfMemoryError)):
            decoder.decode(noise())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert decoder.decode(noise()).any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_devices_share_a_picture(vae: AutoencoderKLWan) -> None:
    expected = TiledDecoder([vae]).decode(noise(), raw=True)
    both = TiledDecoder([vae, copy.deepcopy(vae).to("cuda:1")])
    got = both.decode(noise(), raw=True)
    assert len(both.tiles) == 2 and (got - expected).norm() <= 1e-4 * expected.norm()
