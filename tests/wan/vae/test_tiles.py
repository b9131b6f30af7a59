"""Tiles make up the whole picture, and take the memory and work that `Picture` says."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import AutoencoderKLWan

from serve_app.wan.vae.chunks import ChunkDecoder
from serve_app.wan.vae.cpu_layers import speed_up
from serve_app.wan.vae.tiled_decoder import TiledDecoder
from serve_app.wan.vae.tiles import MIN_SIDE, Picture, Tile, halos_of
from tests.support.live_bytes import LiveBytes


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def small(num_res_blocks: int = 1, fast: bool = True) -> AutoencoderKLWan:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(num_res_blocks)
        vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=num_res_blocks).eval()
    if fast:
        speed_up(vae)
    return vae


def a14b(dtype: torch.dtype = torch.float32) -> ChunkDecoder:
    """The layers of A14B's VAE on the meta device: live bytes can be counted, and nothing is computed."""
    with torch.device("meta"):
        return ChunkDecoder(AutoencoderKLWan().eval().to(dtype))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fast", [False, True], ids=["diffusers' layers", "layers for CPUs"])
def test_whole_pictures_are_those_of_diffusers_to_the_bit(fast: bool) -> None:
    vae, latents = small(fast=fast), noise(2, 16, 3, 6, 8)
    expected = vae.decode(latents, return_dict=False)[0]
    assert torch.equal(TiledDecoder([vae]).decode(latents, raw=True), expected.permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize(
    ("num_res_blocks", "height", "width", "least_tiles"), [(1, 25, 17, 6), (2, 8, 33, 4), (1, 12, 15, 1)]
)
def test_tiles_are_the_whole_picture(num_res_blocks: int, height: int, width: int, least_tiles: int) -> None:
    vae, latents = small(num_res_blocks), noise(1, 16, 2, height, width)
    whole, tiled = TiledDecoder([vae]), TiledDecoder([vae], max_tile_bytes=1)
    expected, got = whole.decode(latents, raw=True), tiled.decode(latents, raw=True)
    assert (len(whole.tiles), expected.shape) == (1, (1, 5, 8 * height, 8 * width, 3))
    assert len(tiled.tiles) >= least_tiles
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    assert expected.std() > 0.01, "a grey picture would be equal wherever it is cut"
    levels = [decoder.decode(latents).int() for decoder in (whole, tiled)]
    assert (levels[0] - levels[1]).abs().max() <= 1


@pytest.mark.parametrize(("num_res_blocks", "expected"), [(1, (9, 8, 7, 5)), (2, (13, 12, 10, 7))])
def test_a_halo_is_as_wide_as_what_a_tile_looks_at(num_res_blocks: int, expected: tuple[int, ...]) -> None:
    """Change one latent pixel: rows of pixels change if their halo contains it, and no others do."""
    stream = ChunkDecoder(small(num_res_blocks, fast=False))
    assert halos_of(stream.levels) == expected
    height, row = 2 * expected[0] + 5, expected[0] + 2
    picture = Picture(stream.levels, height, 4)
    feature = noise(1, stream.levels[0].channels_in, 1, height, 4)
    changed = feature.clone()
    changed[:, :, :, row] += 1
    before, after = (next(stream.frames([one], picture.spans(picture.whole))) for one in (feature, changed))
    different = (before != after).any(dim=-1)[0].any(dim=0)[0].view(height, 8).any(dim=1)
    reached = [abs(index - row) <= expected[0] for index in range(height)]
    assert different.tolist() == reached and not all(reached)


@pytest.mark.parametrize("level", range(4))
def test_a_halo_that_is_one_pixel_smaller_would_show(level: int) -> None:
    stream = ChunkDecoder(small())
    tile = Tile((12, 20), (12, 20))
    features = list(stream.features(noise(1, 16, 2, 32, 32)))
    enough = halos_of(stream.levels)
    short = tuple(halo - (index == level) for index, halo in enumerate(enough))

    def chunks(picture: Picture, tile: Tile) -> torch.Tensor:
        return torch.cat(list(stream.frames(features, picture.spans(tile))), dim=2)

    picture = Picture(stream.levels, 32, 32)
    expected = chunks(picture, picture.whole)[..., 96:160, 96:160]
    noise_alone = (chunks(picture, tile) - expected).abs().max()
    assert noise_alone <= 1e-5 * expected.abs().max()
    wrong = chunks(Picture(stream.levels, 32, 32, halos=short), tile)
    # The outermost pixel has little weight.
    assert wrong.shape == expected.shape and (wrong - expected).abs().max() > 10 * noise_alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "tile",
    [Tile((0, 90), (0, 160)), Tile((0, 90), (80, 160)), Tile((45, 90), (40, 80)), Tile((40, 48), (40, 48))],
    ids=["whole", "half", "eighth", "smallest"],
)
def test_memory_of_a_tile_of_a14b_is_as_predicted(dtype: torch.dtype, tile: Tile) -> None:
    stream = a14b(dtype)
    picture = Picture(stream.levels, 90, 160, itemsize=dtype.itemsize)
    feature = torch.empty(1, 384, 1, 90, 160, dtype=dtype, device="meta")
    with LiveBytes() as live:
        for chunk in stream.frames([feature] * 3, picture.spans(tile)):
            assert chunk.shape[-2:] == (8 * (tile.rows[1] - tile.rows[0]), 8 * (tile.columns[1] - tile.columns[0]))
    assert picture.tile_bytes(tile) == pytest.approx(live.peak, rel=0.05)


def test_memory_does_not_grow_with_frames() -> None:
    """Only the latents grow, of which the decoder makes two copies with 16 channels."""
    stream = a14b()
    picture = Picture(stream.levels, 90, 160)

    def peak(chunks: int) -> int:
        latents = torch.empty(1, 16, chunks, 90, 160, device="meta")
        with LiveBytes() as live:
            for chunk in stream.frames(stream.features(latents), picture.spans(picture.whole)):
                assert chunk.device.type == "meta"
        return live.peak

    assert peak(12) - peak(4) <= 2 * 8 * 16 * 90 * 160 * 4


def test_the_numbers_that_decided_the_order_of_the_loops() -> None:
    levels = a14b().levels
    picture = Picture(levels, 90, 160)
    remembered = sum(2 * level.remembered * 90 * 160 * 4**index * 4 for index, level in enumerate(levels))
    assert remembered / 1e9 == pytest.approx(8.5, abs=0.05)
    assert picture.tile_bytes(picture.whole) / 1e9 == pytest.approx(17.7, abs=0.05)
    assert levels[0].channels_in * 90 * 160 * 4 / 1e6 == pytest.approx(22, abs=0.5)


def test_tiles_cover_the_picture_fit_and_cost_little() -> None:
    picture = Picture(a14b().levels, 90, 160)
    assert picture.tiles() == [picture.whole]
    for most, devices in [(8e9, 1), (8e9, 2), (2e9, 1), (math.inf, 2), (math.inf, 8)]:
        tiles = picture.tiles(most, devices)
        assert len(tiles) % devices == 0, "a device would be idle"
        assert max(map(picture.tile_bytes, tiles)) <= most
        covered = torch.zeros(90, 160, dtype=torch.int)
        for tile in tiles:
            covered[slice(*tile.rows), slice(*tile.columns)] += 1
        assert (covered == 1).all()
        if most >= 8e9:
            assert sum(map(picture.work, tiles)) <= 1.25 * picture.work(picture.whole)
    smallest = picture.tiles(1)
    assert all(MIN_SIDE <= span[1] - span[0] < 2 * MIN_SIDE for tile in smallest for span in (tile.rows, tile.columns))


def test_halves_are_cut_across_the_longer_side_down_to_the_smallest() -> None:
    assert Tile((0, 90), (0, 160)).halves() == (Tile((0, 90), (0, 80)), Tile((0, 90), (80, 160)))
    assert Tile((2, 19), (3, 11)).halves() == (Tile((2, 10), (3, 11)), Tile((10, 19), (3, 11)))
    assert Tile((0, 15), (0, 15)).halves() is None


def test_devices_share_a_picture() -> None:
    vae, latents = small(), noise(2, 16, 2, 16, 24)
    alone = TiledDecoder([vae])
    expected = alone.decode(latents, raw=True)
    three = TiledDecoder([vae, copy.deepcopy(vae), copy.deepcopy(vae)])
    got = three.decode(latents, raw=True)
    assert len(three.tiles) == 3
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_a_device_that_fails_ends_the_decode_on_all() -> None:
    good, bad = small(), small()
    bad.decoder.conv_out.weight.data = bad.decoder.conv_out.weight.data[:, :1]
    decoder = TiledDecoder([good, bad], max_tile_bytes=1)
    with pytest.raises(RuntimeError, match="channel"):
        decoder.decode(noise(1, 16, 2, 16, 64))
    assert len(decoder.tiles) < 16, "the other device went on to the end"
