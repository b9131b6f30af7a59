"""Tiles of a picture that a video decoder decodes one by one, with the memory and work of each. Computes no pixels.

The decoder's middle block looks at the whole picture. The layers after it are convolutions, nearest-neighbour
doublings and norms of single pixels: an output pixel depends on few input pixels around it. A tile is decoded with a
halo of those pixels, which is cut off level by level, as soon as no later layer looks at it. At the edge of the picture
a tile has no halo: the layers' own zero padding belongs there. So tiles are equal to the whole picture but for the
order of sums, and nothing is blended.

Tiles are the outer loop, time is the inner one. Every convolution remembers two frames of its input, which is half of
the memory at 720p (A14B's VAE, float32: 8.5 of 17.7 GB). With time as the outer loop, these frames would be alive for
all tiles at once, however small the tiles are. The price is that the middle block's output is kept until the last tile:
22 MB a latent frame, in host memory. `tests/wan/vae/test_tiles.py` computes these numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from serve_app.wan.weights.tensors import VaeConfig

MIN_SIDE = 8
"""Latent pixels along a side of the smallest tile. A smaller tile would be mostly halo."""

Span = tuple[int, int]
"""The first pixel, and the one behind the last."""


@dataclass(frozen=True)
class Level:
    """One of the decoder's up blocks, with the output layers if it is the last.

    Attributes:
        channels_in, channels, channels_out: of the input, inside, and of the output.
        frames: input frames of a chunk, which is one latent frame.
        reach: input pixels to each side that the residual blocks look at.
        scale: factor by which the output is wider and higher than the input.
        more_frames: factor by which the output has more frames.
        reach_after: output pixels to each side that the convolution after the enlargement looks at.
        remembered: sum of the channels, over all convolutions, of which two frames are kept from chunk to chunk.
        work: multiplications for each input pixel, all frames of a chunk together.
    """

    channels_in: int
    channels: int
    frames: int
    reach: int
    scale: int
    more_frames: int
    reach_after: int
    channels_out: int
    remembered: int
    work: int

    def numbers_held(self, itemsize: int) -> int:
        """Return the most numbers for each input pixel that are alive at once, beside the remembered frames.

        Args:
            itemsize: bytes of a number.
        """
        f, c = self.frames, self.channels
        # Alive are the block's input and its residual, and in addition either of two: a convolution's input, the two
        # copies that join it with the remembered frames and pad it, and the frames to remember next; or a norm, which
        # diffusers computes in float32.
        norm = 4 * f if itemsize >= 4 else 5 * f
        residual = self.channels_in * f + c * f + c * max(3 * f + 6, norm)
        if self.scale == 1:
            return residual
        # Alive are the block's input and output, a copy of the output with all frames, and its enlargement: this either
        # beside the result of the convolution, or in float32 first.
        more, larger = f * self.more_frames, self.scale**2
        enlarged = larger * (c + self.channels_out) if itemsize >= 4 else larger * c * (1 + 4 // itemsize)
        return max(residual, self.channels_in * f + c * f + more * (c + enlarged))


def levels(decoder: nn.Module) -> tuple[Level, ...]:
    """Return the levels of an `AutoencoderKLWan`'s decoder, from its layers."""
    found: list[Level] = []
    frames = 1
    blocks: list[Any] = list(decoder.up_blocks)  # type: ignore[arg-type]
    for block in blocks:
        convolutions = [layer for resnet in block.resnets for layer in (resnet.conv1, resnet.conv2)]
        weights = sum(p.numel() for p in block.resnets.parameters() if p.dim() == 5)
        scale, more_frames, reach_after, remembered, work = 1, 1, 0, 0, weights * frames
        channels = channels_out = convolutions[-1].out_channels
        if block.upsamplers is not None:
            (upsampler,) = block.upsamplers
            enlarge, after = upsampler.resample
            scale, reach_after, channels_out = int(enlarge.scale_factor[0]), _reach(after), after.out_channels
            if upsampler.mode == "upsample3d":
                more_frames, remembered = 2, upsampler.time_conv.in_channels
                work += upsampler.time_conv.weight.numel() * frames
            work += after.weight.numel() * frames * more_frames * scale**2
        if block is blocks[-1]:
            convolutions.append(decoder.conv_out)
            work += decoder.conv_out.weight.numel() * frames  # type: ignore[operator, union-attr]
        found.append(
            Level(
                channels_in=convolutions[0].in_channels,
                channels=channels,
                frames=frames,
                reach=sum(map(_reach, convolutions)),
                scale=scale,
                more_frames=more_frames,
                reach_after=reach_after,
                channels_out=channels_out,
                remembered=remembered + sum(layer.in_channels for layer in convolutions),
                work=work,
            )
        )
        frames *= more_frames
    return tuple(found)


def levels_of(config: VaeConfig) -> tuple[Level, ...]:
    """Return the levels of the decoder that a VAE's configuration describes, as `levels` finds them in its layers."""
    base = config.decoder_base_dim or config.base_dim
    widths = [base * factor for factor in (config.dim_mult[-1], *reversed(config.dim_mult))]
    doubles = [*reversed(config.temperal_downsample), False]
    found: list[Level] = []
    frames = 1
    for number, (inputs, width) in enumerate(itertools.pairwise(widths)):
        first, last = inputs // 2 if number else inputs, number == len(config.dim_mult) - 1
        ins = [first, *[width] * config.num_res_blocks]
        work = frames * sum(27 * width * (one + width) + (one * width if one != width else 0) for one in ins)
        remembered = sum(one + width for one in ins)
        reach = 2 * len(ins)
        more_frames = 2 if doubles[number] else 1
        if last:
            work += frames * 27 * width * config.out_channels
            remembered, reach = remembered + width, reach + 1
        else:
            work += frames * more_frames * 4 * 9 * width * (width // 2)
            if doubles[number]:
                work += frames * 3 * width * 2 * width
                remembered += width
        found.append(
            Level(
                channels_in=first,
                channels=width,
                frames=frames,
                reach=reach,
                scale=1 if last else 2,
                more_frames=more_frames,
                reach_after=0 if last else 1,
                channels_out=width if last else width // 2,
                remembered=remembered,
                work=work,
            )
        )
        frames *= more_frames
    return tuple(found)


def _reach(convolution: Any) -> int:
    return int(convolution.kernel_size[-1]) // 2


def halos_of(levels: Iterable[Level]) -> tuple[int, ...]:
    """Return the width of a tile's halo at each level, in pixels of the level's input."""
    found: list[int] = []
    need = 0
    for level in reversed(tuple(levels)):
        need = math.ceil((need + level.reach_after) / level.scale) + level.reach
        found.append(need)
    return tuple(reversed(found))


@dataclass(frozen=True)
class Tile:
    """A rectangle of latent pixels."""

    rows: Span
    columns: Span

    def halves(self) -> tuple[Tile, Tile] | None:
        """Return two tiles in its place, cut across the longer side; None if they would be too small."""
        (top, bottom), (left, right) = self.rows, self.columns
        if max(bottom - top, right - left) < 2 * MIN_SIDE:
            return None
        if bottom - top > right - left:
            middle = (top + bottom) // 2
            return Tile((top, middle), self.columns), Tile((middle, bottom), self.columns)
        middle = (left + right) // 2
        return Tile(self.rows, (left, middle)), Tile(self.rows, (middle, right))


class Picture:
    """The pictures of a decode, to be cut into tiles.

    Args:
        levels: levels of the decoder.
        height, width: in latent pixels.
        samples: number of videos that are decoded together.
        itemsize: bytes of a number.
        halos: width of a tile's halo at each level; as many pixels as the layers look at if not given.

    Attributes:
        whole: the tile that is the whole picture.
    """

    def __init__(
        self,
        levels: tuple[Level, ...],
        height: int,
        width: int,
        samples: int = 1,
        itemsize: int = 4,
        halos: tuple[int, ...] | None = None,
    ) -> None:
        self._levels = levels
        self._halos = halos_of(levels) if halos is None else halos
        self._samples = samples
        self._itemsize = itemsize
        self.whole = Tile((0, height), (0, width))

    def spans(self, tile: Tile) -> list[Tile]:
        """Return the part of each level's input that a tile needs, halo included, and last its output pixels."""
        (_, height), (_, width) = self.whole.rows, self.whole.columns
        return [
            Tile(rows, columns)
            for rows, columns in zip(self._axis(*tile.rows, height), self._axis(*tile.columns, width), strict=True)
        ]

    def frames(self, chunks: int) -> int:
        """Return the number of frames of `chunks` latent frames, the first of which is a single frame."""
        return 1 + math.prod(level.more_frames for level in self._levels) * (chunks - 1)

    def tile_bytes(self, tile: Tile) -> int:
        """Return the bytes of device memory that decoding a tile takes beside the weights.

        Counted are the frames that convolutions remember, and the most that a level holds at once. The work space of
        single layers is not known here.
        """
        remembered, most = 0, 0
        for level, span in zip(self._levels, self.spans(tile), strict=False):
            area = _length(span.rows) * _length(span.columns)
            remembered += 2 * level.remembered * area
            most = max(most, level.numbers_held(self._itemsize) * area)
        return (remembered + most) * self._samples * self._itemsize

    def work(self, tile: Tile) -> int:
        """Return the number of multiplications for a latent frame of a tile, halo included."""
        return sum(
            level.work * _length(span.rows) * _length(span.columns) * self._samples
            for level, span in zip(self._levels, self.spans(tile), strict=False)
        )

    def tiles(self, max_tile_bytes: float = math.inf, devices: int = 1) -> list[Tile]:
        """Return the grid of tiles that fit which `devices` devices finish first; the smallest tiles if none fit."""
        found: list[tuple[tuple[bool, float, int], list[Span], list[Span]]] = []
        # The tile with the most halo stands for all tiles: they differ in little else.
        cuts = [
            [(spans, self._widest(spans, size)) for spans in _cuts(size)]
            for size in (self.whole.rows[1], self.whole.columns[1])
        ]
        for (rows, tallest), (columns, widest) in itertools.product(*cuts):
            count, tile = len(rows) * len(columns), Tile(tallest, widest)
            size = self.tile_bytes(tile)
            fits = size <= max_tile_bytes
            cost = math.ceil(count / devices) * self.work(tile) if fits else size
            found.append(((not fits, cost, count), rows, columns))
        _, rows, columns = min(found, key=lambda one: one[0])
        return [Tile(*both) for both in itertools.product(rows, columns)]

    def _axis(self, start: int, stop: int, size: int) -> Iterator[Span]:
        scale = 1
        for level, halo in zip(self._levels, self._halos, strict=True):
            yield max(0, start * scale - halo), min(size * scale, stop * scale + halo)
            scale *= level.scale
        yield start * scale, stop * scale

    def _widest(self, spans: list[Span], size: int) -> Span:
        return max(spans, key=lambda span: sum(_length(part) for part in self._axis(span[0], span[1], size)))


def _cuts(size: int) -> Iterator[list[Span]]:
    """Yield the ways to cut a side into equal parts, one for each length of the longest part."""
    before = 0
    for count in range(1, max(1, size // MIN_SIDE) + 1):
        if (longest := math.ceil(size / count)) != before:
            before = longest
            edges = [size * index // count for index in range(count + 1)]
            yield list(itertools.pairwise(edges))


def _length(span: Span) -> int:
    return span[1] - span[0]
