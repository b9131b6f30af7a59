from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanTransformerBlock

from serve_app.wan.kernels import fused

WIDTH, TOKENS = 48, 10


def modulated(
    hidden: torch.Tensor, added: torch.Tensor | None, modulation: torch.Tensor, first: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of a kernel that wants CUDA; tests/gpu compares that with the same formula."""
    total = hidden if added is None else hidden + added
    normed = F.layer_norm(total, total.shape[2:], eps=eps)
    return total, normed * (1 + modulation[:, first + 1 : first + 2]) + modulation[:, first : first + 1]


def test_a_block_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_modulated", modulated)
    torch.manual_seed(0)
    block = WanTransformerBlock(WIDTH, 96, 2, cross_attn_norm=True).eval().requires_grad_(False)
    torch.nn.init.normal_(block.norm2.weight)
    hidden, text = torch.randn(2, TOKENS, WIDTH), torch.randn(2, 7, WIDTH)
    embedding = torch.randn(2, 6, WIDTH)
    angle = torch.rand(1, TOKENS, 1, WIDTH // 2)
    given = (hidden, text, embedding, (angle.cos(), angle.sin()))
    torch.testing.assert_close(fused.block_forward(block, *given), block(*given))
