"""Faster layers of the VAE for CPUs, in float32: the same weights, and the same sums in another order.

PyTorch (2.13) sends a 3-D convolution of a single video to a fallback that unfolds it, and normalises over channels
through a generic reduction; together they are most of a decode on CPUs. `python -m benchmarks.model.cpu_vae` measures
the gain and how far frames differ.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch import nn

_EPS = 1e-12  # least divisor, as in torch.nn.functional.normalize


def speed_up(vae: nn.Module) -> None:
    """Replace the layers of a float32 VAE on a CPU by faster ones, if this build of PyTorch has oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return
    for layer in vae.modules():
        # Exact classes only: subclasses in a newer diffusers may compute something else.
        if type(layer) is WanCausalConv3d:
            layer.__class__ = _Convolution
        elif type(layer) is WanRMS_norm:
            layer.__class__ = _Norm


class _Convolution(WanCausalConv3d):
    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = torch.ops.aten.mkldnn_convolution(
            input, weight, bias, self.padding, self.stride, self.dilation, self.groups
        )
        return result


class _Norm(WanRMS_norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.square().sum(1 if self.channel_first else -1, keepdim=True).sqrt().clamp_min(_EPS)
        return x * (self.scale / length) * self.gamma + self.bias
