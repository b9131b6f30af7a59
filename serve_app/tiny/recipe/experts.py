"""The experts: their shape, their creation and loading, and the loss of flow matching.

Knows nothing of data, optimisers or commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from serve_app.tiny.recipe.captions import DEFAULTS
from serve_app.tiny.recipe.text import TEXT_CONFIG, ShortCrossAttention

EXPERT: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 8,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_CONFIG["d_model"],
    "freq_dim": 128,
    "ffn_dim": 512,
    "num_layers": 5,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
BOUNDARY = 0.875
FOLDERS = ("transformer", "transformer_2")


class PatchEmbedding(nn.Conv3d):
    """The patch embedding as one matrix product: same weights and names, without the slow 3D convolution."""

    def forward(self, input: Tensor) -> Tensor:  # named as in the base class
        """Map [n, c, t, h, w] to [n, d, t, h / p, w / q]; the kernel is 1 x p x q."""
        n, c, t, h, w = input.shape
        p, q = self.kernel_size[1:]
        patches = input.reshape(n, c, t, h // p, p, w // q, q).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


def quicken(expert: WanTransformer3DModel) -> None:
    """Change an expert in place so that it computes the same in less time, for training."""
    expert.patch_embedding.__class__ = PatchEmbedding
    for block in expert.blocks:
        block.attn2.set_processor(ShortCrossAttention())


def new_experts(**changes: Any) -> nn.ModuleList:
    """Return two untrained experts, which predict zero at first. `changes` override EXPERT."""
    experts = [WanTransformer3DModel(**(EXPERT | changes)) for _ in FOLDERS]
    for expert in experts:
        nn.init.zeros_(expert.proj_out.weight)
        nn.init.zeros_(expert.proj_out.bias)
    return nn.ModuleList(experts)


def load_experts(folder: Path) -> nn.ModuleList:
    """Load both experts of a folder in the diffusers layout, in fp32."""
    return nn.ModuleList(WanTransformer3DModel.from_pretrained(folder / name, dtype=torch.float32) for name in FOLDERS)


def draw_sigma(n: int, high: bool, device: torch.device) -> Tensor:
    """Draw noise levels of one expert, [n], distributed like the sampler's shifted steps."""
    shift = DEFAULTS["flow_shift"]
    edge = BOUNDARY / (shift - (shift - 1) * BOUNDARY)
    u = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
    s = edge + (1 - edge) * u if high else edge * u
    return shift * s / (1 + (shift - 1) * s)


def expert_loss(model: WanTransformer3DModel, x: Tensor, noise: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
    """Return the mean squared error of the predicted velocity noise - x at x_t = (1 - sigma) x + sigma noise."""
    s = sigma.view(-1, 1, 1, 1, 1)
    out = model(
        hidden_states=(1 - s) * x + s * noise, timestep=1000 * sigma, encoder_hidden_states=words, return_dict=False
    )[0]
    return ((out.float() - (noise - x)) ** 2).mean()
