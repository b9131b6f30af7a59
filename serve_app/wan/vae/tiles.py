"""Tiles of a picture that a video decoder decodes one by one, and what each costs. Does no work itself.

Above its middle block, which looks at the whole picture, a decoder is convolutions, nearest-neighbour doublings and
norms of single pixels: what a pixel becomes depends on a few around it. A tile is decoded with a halo of those, which
is cut off level by level, as soon as no layer that follows looks at it. Where a tile ends with the picture there is no
halo: the layers' own zeros belong there. So tiles are equal to the whole picture but for the order of sums; nothing is
blended.

Tiles are the outer loop, time is the inner one. Every convolution remembers two frames of what it saw, and that is
half of the memory at 720p (A14B's VAE, float32: 8.5 of 17.7 GB): with time outside, the memories of all tiles would be
alive at once, however small the tiles are. The price is that the middle block's output waits for the last tile: 22 MB
a latent frame, in host memory. `tests/wan/vae/test_tiles.py` computes these numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

LEAST = 8
"""Latent pixels along a side of the smallest tile. A smaller one would be halo for the most part."""

Span = tuple[int, int]
"""From the first pixel to the one behind the last."""


@dataclass(frozen=True)
class Level:
    """One of the decoder's up blocks, with the output layers if it is the last.

    Attributes:
        channels_in, channels: of what enters, and inside.
        frames: of a chunk that enter: one latent frame is one chunk.
        reach: pixels to each side that its residual blocks look at.
        scale: how many times as wide and high what leaves is; `more_frames` the same of time.
        reach_after: pixels, so enlarged, that the convolution behind the enlargement looks at.
        channels_out: of what leaves.
        remembered: channels, all convolutions together, of which two frames are kept from chunk to chunk.
        work: multiplications for each pixel that enters, all frames of a chunk together.
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
        """Numbers for each pixel that enters that are alive in its widest moment, beside what is remembered."""
        f, c = self.frames, self.channels
        # The block's input, its residual, and then either a convolution's input, the two copies that join it with what
        # is remembered and pad it, and what will be remembered; or a norm, which diffusers does in float32.
        norm = 4 * f if itemsize >= 4 else 5 * f
        residual = self.channels_in * f + c * f + c * max(3 * f + 6, norm)
        if self.scale == 1:
            return residual
        # The block's input and output, a copy of the latter with all frames, and its enlargement: either beside what
        # the convolution makes of it, or in float32 first.
        more, larger = f * self.more_frames, self.scale**2
        enlarged = larger * (c + self.channels_out) if itemsize >= 4 else larger * c * (1 + 4 // itemsize)
        return max(residual, self.channels_in * f + c * f + more * (c + enlarged))


def levels(decoder: nn.Module) -> tuple[Level, ...]:
    """The levels of an `AutoencoderKLWan`'s decoder, from its layers."""
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


def _reach(convolution: Any) -> int:
    return int(convolution.kernel_size[-1]) // 2


def halos(those: Iterable[Level]) -> tuple[int, ...]:
    """Pixels around a tile that each level has to be given, at the resolution of what enters it."""
    found: list[int] = []
    need = 0
    for level in reversed(tuple(those)):
        need = math.ceil((need + level.reach_after) / level.scale) + level.reach
        found.append(need)
    return tuple(reversed(found))


@dataclass(frozen=True)
class Tile:
    """A rectangle of latent pixels."""

    rows: Span
    columns: Span

    def halves(self) -> tuple[Tile, Tile] | None:
        """Two tiles in its place, cut across the longer side; None if they would be too small."""
        (top, bottom), (left, right) = self.rows, self.columns
        if max(bottom - top, right - left) < 2 * LEAST:
            return None
        if bottom - top > right - left:
            middle = (top + bottom) // 2
            return Tile((top, middle), self.columns), Tile((middle, bottom), self.columns)
        middle = (left + right) // 2
        return Tile(self.rows, (left, middle)), Tile(self.rows, (middle, right))


class Picture:
    """The pictures of a decode, to be cut into tiles.

    Args:
        levels: of the decoder.
        height, width: in latent pixels.
        samples: videos that are decoded together.
        itemsize: bytes of a number.
        given: pixels of its surroundings that a tile gets at each level; as many as the layers look at if left out.
    """

    def __init__(
        self,
        levels: tuple[Level, ...],
        height: int,
        width: int,
        samples: int = 1,
        itemsize: int = 4,
        given: tuple[int, ...] | None = None,
    ) -> None:
        self._levels = levels
        self._halos = halos(levels) if given is None else given
        self._samples = samples
        self._itemsize = itemsize
        self.whole = Tile((0, height), (0, width))

    def spans(self, tile: Tile) -> list[Tile]:
        """What of the picture each level is given for a tile, at that level's resolution, and at last what is left."""
        (_, height), (_, width) = self.whole.rows, self.whole.columns
        return [
            Tile(rows, columns)
            for rows, columns in zip(self._axis(*tile.rows, height), self._axis(*tile.columns, width), strict=True)
        ]

    def frames(self, chunks: int) -> int:
        """Frames of so many latent frames, the first of which is one frame alone."""
        return 1 + math.prod(level.more_frames for level in self._levels) * (chunks - 1)

    def bytes(self, tile: Tile) -> int:
        """Device memory that decoding a tile takes beside the weights: what convolutions remember, and the widest
        moment of the widest level. The work space of single layers is not known here."""
        remembered, most = 0, 0
        for level, span in zip(self._levels, self.spans(tile), strict=False):
            area = _length(span.rows) * _length(span.columns)
            remembered += 2 * level.remembered * area
            most = max(most, level.numbers_held(self._itemsize) * area)
        return (remembered + most) * self._samples * self._itemsize

    def work(self, tile: Tile) -> int:
        """Multiplications for a latent frame of a tile, halo included."""
        return sum(
            level.work * _length(span.rows) * _length(span.columns) * self._samples
            for level, span in zip(self._levels, self.spans(tile), strict=False)
        )

    def tiles(self, most_bytes: float = math.inf, devices: int = 1) -> list[Tile]:
        """The grid that is done soonest on so many devices, of those whose tiles fit; the smallest tiles if none do."""
        found: list[tuple[tuple[bool, float], list[Tile]]] = []
        for rows, columns in itertools.product(_cuts(self.whole.rows[1]), _cuts(self.whole.columns[1])):
            count = len(rows) * len(columns)
            # The tile with the most halo stands for all: they differ in little else.
            widest = Tile(self._widest(rows, self.whole.rows[1]), self._widest(columns, self.whole.columns[1]))
            size = self.bytes(widest)
            fits = size <= most_bytes
            cost = math.ceil(count / devices) * self.work(widest) if fits else size
            found.append(((not fits, cost), [Tile(*both) for both in itertools.product(rows, columns)]))
        return min(found, key=lambda one: (one[0], len(one[1])))[1]

    def _axis(self, start: int, stop: int, size: int) -> Iterator[Span]:
        scale = 1
        for level, halo in zip(self._levels, self._halos, strict=True):
            yield max(0, start * scale - halo), min(size * scale, stop * scale + halo)
            scale *= level.scale
        yield start * scale, stop * scale

    def _widest(self, spans: list[Span], size: int) -> Span:
        return max(spans, key=lambda span: sum(_length(part) for part in self._axis(span[0], span[1], size)))


def _cuts(size: int) -> Iterator[list[Span]]:
    """A side cut into equal parts, as many ways as give parts of another length."""
    before = 0
    for count in range(1, max(1, size // LEAST) + 1):
        if (longest := math.ceil(size / count)) != before:
            before = longest
            edges = [size * index // count for index in range(count + 1)]
            yield list(itertools.pairwise(edges))


def _length(span: Span) -> int:
    return span[1] - span[0]
