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
_Cache = defaultdict[int, Any]


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
        decoder, cache = self._decoder, _new_cache()
        for frame in self._vae.post_quant_conv(latents).split(1, dim=2):
            cache_index = [0]
            x = _causal_conv(decoder.conv_in, frame, cache, cache_index)
            yield decoder.mid_block(x, feat_cache=cache, feat_idx=cache_index)

    def frames(self, features: Iterable[torch.Tensor], spans: Sequence[Tile]) -> Iterator[torch.Tensor]:
        """Yield a tile's pixels chunk by chunk, `[samples, 3, frames, rows, columns]`: one frame first, then four each.

        Args:
            features: of whole pictures, as `features` yields them.
            spans: input of each level, as `Picture.spans` returns it.
        """
        decoder, cache, device = self._decoder, _new_cache(), self.device
        for index, feature in enumerate(features):
            cache_index, x = [0], _crop(feature.to(device, non_blocking=True), spans[0])
            steps = zip(decoder.up_blocks, self.levels, itertools.pairwise(spans), strict=True)
            for block, level, (source, wanted) in steps:
                last = block is decoder.up_blocks[-1]
                x = block(x, feat_cache=cache, feat_idx=cache_index, first_chunk=index == 0)
                if last:
                    x = _causal_conv(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)), cache, cache_index)
                x = _crop(x, wanted, source, level.scale)
            yield x


def _new_cache() -> _Cache:
    return defaultdict(lambda: None)


def _causal_conv(convolution: torch.nn.Module, x: torch.Tensor, cache: _Cache, cache_index: list[int]) -> torch.Tensor:
    """Apply a causal convolution that is outside of diffusers' blocks. Those do the same for the ones inside."""
    before = cache[cache_index[0]]
    recent = x[:, :, -_BACK:] if before is None else torch.cat([before, x[:, :, -_BACK:]], dim=2)[:, :, -_BACK:]
    cache[cache_index[0]] = recent.clone()
    cache_index[0] += 1
    result: torch.Tensor = convolution(x, before)
    return result


def _crop(x: torch.Tensor, wanted: Tile, source: Tile | None = None, scale: int = 1) -> torch.Tensor:
    """Cut the tile `wanted` out of pictures whose corner is that of `source`, enlarged by `scale`; 0, 0 without it."""
    top, left = (source.rows[0] * scale, source.columns[0] * scale) if source else (0, 0)
    return x[..., wanted.rows[0] - top : wanted.rows[1] - top, wanted.columns[0] - left : wanted.columns[1] - left]
