"""AutoencoderKLWan computed over whole clips at once, with the weights of a given module.

diffusers encodes and decodes in chunks of frames with a feature cache; that loop is exact but launch-bound. Here each
causal convolution sees the whole clip, zero-padded in front, which is the same computation (tests/tiny/test_fullseq.py
shows equality) in a tenth of the kernels. Tensors are channels-last, [B, T, H, W, C]: a 3x3x3 causal convolution is
then one 2D convolution over three frames stacked in the channels, which tensor cores run well at few channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanUpBlock,
)
from torch import Tensor, nn


def _taps(x: Tensor) -> Tensor:
    """Stack each frame with its two predecessors (zeros before the clip) in the channels: [..., C] to [..., 3C]."""
    t = x.shape[1]
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
    return torch.cat([padded[:, :t], padded[:, 1 : t + 1], padded[:, 2:]], -1)


def _flat_weight(conv: nn.Conv3d) -> Tensor:
    """Return the weight [O, I, kt, kh, kw] as [O, kt*I, kh, kw], in the order of `_taps`."""
    return conv.weight.permute(0, 2, 1, 3, 4).flatten(1, 2)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0, stride: int = 1) -> Tensor:
    b, t = x.shape[:2]
    y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, padding=padding, stride=stride)
    return y.permute(0, 2, 3, 1).unflatten(0, (b, t))


def _causal(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    if conv.kernel_size == (1, 1, 1):
        return F.linear(x, conv.weight.flatten(1), conv.bias)
    if conv.kernel_size == (3, 1, 1):
        return F.linear(_taps(x), _flat_weight(conv).flatten(1), conv.bias)
    return _conv2d(_taps(x), _flat_weight(conv), conv.bias, padding=1)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return (F.normalize(x.float(), dim=-1) * (norm.scale * norm.gamma.flatten())).to(x.dtype)


def _residual(block: WanResidualBlock, x: Tensor) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _causal(block.conv_shortcut, x)
    x = _causal(block.conv1, F.silu(_norm(block.norm1, x)))
    return _causal(block.conv2, F.silu(_norm(block.norm2, x))) + shortcut


def _attention(block: WanAttentionBlock, x: Tensor) -> Tensor:
    qkv = F.linear(_norm(block.norm, x), block.to_qkv.weight.flatten(1), block.to_qkv.bias)
    b, t, h, w, _ = x.shape
    q, k, v = qkv.reshape(b * t, 1, h * w, -1).chunk(3, -1)
    y = F.scaled_dot_product_attention(q, k, v).reshape(b, t, h, w, -1)
    return x + F.linear(y, block.proj.weight.flatten(1), block.proj.bias)


def _middle(block: WanMidBlock, x: Tensor) -> Tensor:
    x = _residual(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(resnet, _attention(attention, x))
    return x


def _resample(block: WanResample, x: Tensor) -> Tensor:
    conv = block.resample[1]
    if block.mode.startswith("downsample"):
        x = _conv2d(F.pad(x, (0, 0, 0, 1, 0, 1)), conv.weight, conv.bias, stride=2)
        if block.mode == "downsample3d" and x.shape[1] > 1:
            # The first frame stays alone; the others are pairs seen together with the frame before them.
            triples = torch.cat([x[:, 0:-2:2], x[:, 1:-1:2], x[:, 2::2]], -1)
            rest = F.linear(triples, _flat_weight(block.time_conv).flatten(1), block.time_conv.bias)
            x = torch.cat([x[:, :1].to(rest.dtype), rest], 1)
        return x
    if block.mode == "upsample3d" and x.shape[1] > 1:
        rest = _causal(block.time_conv, x[:, 1:])
        b, t, h, w, c = rest.shape
        rest = rest.reshape(b, t, h, w, 2, c // 2).permute(0, 1, 4, 2, 3, 5).reshape(b, 2 * t, h, w, c // 2)
        x = torch.cat([x[:, :1].to(rest.dtype), rest], 1)
    b, t, h, w, c = x.shape
    x = x[:, :, :, None, :, None].expand(b, t, h, 2, w, 2, c).reshape(b, t, 2 * h, 2 * w, c)
    return _conv2d(x, conv.weight, conv.bias, padding=1)


def _layer(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, WanResidualBlock):
        return _residual(layer, x)
    if isinstance(layer, WanAttentionBlock):
        return _attention(layer, x)
    if isinstance(layer, WanUpBlock):
        for resnet in layer.resnets:
            x = _residual(resnet, x)
        return x if layer.upsamplers is None else _resample(layer.upsamplers[0], x)
    return _resample(layer, x)


def encode(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    """Encode a clip [B, 3, 4k+1, H, W] in [-1, 1] to the unnormalised mean [B, 16, 1+k, H/8, W/8] of the posterior."""
    net = vae.encoder
    x = _causal(net.conv_in, clip.permute(0, 2, 3, 4, 1))
    for layer in net.down_blocks:
        x = _layer(layer, x)
    x = _causal(net.conv_out, F.silu(_norm(net.norm_out, _middle(net.mid_block, x))))
    return _causal(vae.quant_conv, x)[..., : vae.config.z_dim].permute(0, 4, 1, 2, 3)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode unnormalised latents [B, 16, 1+k, H/8, W/8] to a clip [B, 3, 1+4k, H, W], not clamped."""
    net = vae.decoder
    x = _causal(net.conv_in, _causal(vae.post_quant_conv, latents.permute(0, 2, 3, 4, 1)))
    x = _middle(net.mid_block, x)
    for layer in net.up_blocks:
        x = _layer(layer, x)
    return _causal(net.conv_out, F.silu(_norm(net.norm_out, x))).permute(0, 4, 1, 2, 3)
