"""The VAE's layers as CPUs do them fastest, in float32. Same weights, same sums in another order.

PyTorch (2.13) sends a 3-D convolution of a single video to a fallback that unfolds it, and normalises over channels
through a generic reduction; both are most of a decode on CPUs. `python -m benchmarks.model.cpu_vae` measures what is
won and how far frames differ.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch import nn

# What torch.nn.functional.normalize never divides by less than.
_LEAST = 1e-12


def speed_up(vae: nn.Module) -> None:
    """Let the layers of a float32 VAE on a CPU do their work in the faster way; nothing where that is not built in."""
    if not torch.backends.mkldnn.is_available():
        return
    for layer in vae.modules():
        # The exact classes: what a newer diffusers derives from them may mean something else.
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
        length = x.square().sum(1 if self.channel_first else -1, keepdim=True).sqrt().clamp_min(_LEAST)
        return x * (self.scale / length) * self.gamma + self.bias
