"""Chunked decoding: a VAE's decoder in two parts, both of which work chunk by chunk.

The first part, up to the middle block, needs whole pictures. For the second part a tile is enough. A chunk is one
latent frame. The frames that causal convolutions remember are kept by the call, not by the model, so that several calls
may be under way. The sums are those of `AutoencoderKLWan.decode`, in the same order.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from serve_app.wan.vae.tiles import Level, Tile, levels

_BACK = 2  # frames that a causal convolution looks back
_Memory = defaultdict[int, Any]


class ChunkDecoder:
    """The decoder half of a VAE on one device.

    Args:
        vae: is not changed.

    Attributes:
        levels: levels of the decoder, see `Level`.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self._decoder = vae.decoder
        self.levels: tuple[Level, ...] = levels(vae.decoder)

    @property
    def device(self) -> torch.device:
        """Device that the weights are on."""
        device: torch.device = self._decoder.conv_out.weight.device
        return device

    def features(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the middle block's output for each latent frame, `[samples, channels, 1, height, width]`.

        Args:
            latents: `[samples, channels, frames, height, width]`, scaled.
        """
        decoder, memory = self._decoder, _empty()
        for frame in self._vae.post_quant_conv(latents).split(1, dim=2):
            place = [0]
            x = _causal(decoder.conv_in, frame, memory, place)
            yield decoder.mid_block(x, feat_cache=memory, feat_idx=place)

    def frames(self, features: Iterable[torch.Tensor], spans: Sequence[Tile]) -> Iterator[torch.Tensor]:
        """Yield a tile's pixels chunk by chunk, `[samples, 3, frames, rows, columns]`: one frame first, then four each.

        Args:
            features: of whole pictures, as `features` yields them.
            spans: input of each level, as `Picture.spans` returns it.
        """
        decoder, memory, device = self._decoder, _empty(), self.device
        for index, feature in enumerate(features):
            place, x = [0], _cut(feature.to(device, non_blocking=True), spans[0])
            steps = zip(decoder.up_blocks, self.levels, itertools.pairwise(spans), strict=True)
            for block, level, (given, wanted) in steps:
                last = block is decoder.up_blocks[-1]
                x = block(x, feat_cache=memory, feat_idx=place, first_chunk=index == 0)
                if last:
                    x = _causal(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)), memory, place)
                x = _cut(x, wanted, given, level.scale)
            yield x


def _empty() -> _Memory:
    return defaultdict(lambda: None)


def _causal(convolution: torch.nn.Module, x: torch.Tensor, memory: _Memory, place: list[int]) -> torch.Tensor:
    """Apply a causal convolution that is outside of diffusers' blocks. Those do the same for the ones inside."""
    before = memory[place[0]]
    recent = x[:, :, -_BACK:] if before is None else torch.cat([before, x[:, :, -_BACK:]], dim=2)[:, :, -_BACK:]
    memory[place[0]] = recent.clone()
    place[0] += 1
    result: torch.Tensor = convolution(x, before)
    return result


def _cut(x: torch.Tensor, wanted: Tile, given: Tile | None = None, scale: int = 1) -> torch.Tensor:
    """Cut the tile `wanted` out of pictures whose corner is that of `given`, enlarged by `scale`, or 0, 0."""
    top, left = (given.rows[0] * scale, given.columns[0] * scale) if given else (0, 0)
    return x[..., wanted.rows[0] - top : wanted.rows[1] - top, wanted.columns[0] - left : wanted.columns[1] - left]
