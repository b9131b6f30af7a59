from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, WanTransformerBlock

from serve_app.wan.generate import Generator
from serve_app.wan.kernels import fused
from serve_app.wan.transformer.forward import block_forward, fused_block_forward

WIDTH, TOKENS = 48, 10


def modulated(
    hidden: torch.Tensor, added: torch.Tensor | None, modulation: torch.Tensor, first: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of a kernel that wants CUDA; tests/gpu compares that with the same formula."""
    total = hidden if added is None else hidden + added
    normed = F.layer_norm(total, total.shape[2:], eps=eps)
    return total, normed * (1 + modulation[:, first + 1 : first + 2]) + modulation[:, first : first + 1]


@pytest.mark.parametrize("ours", [block_forward, fused_block_forward])
def test_a_block_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch, ours: Callable[..., torch.Tensor]) -> None:
    monkeypatch.setattr(fused, "_modulated", modulated)
    torch.manual_seed(0)
    block = WanTransformerBlock(WIDTH, 96, 2, cross_attn_norm=True).eval().requires_grad_(False)
    torch.nn.init.normal_(block.norm2.weight)
    hidden, text = torch.randn(2, TOKENS, WIDTH), torch.randn(2, 7, WIDTH)
    embedding = torch.randn(2, 6, WIDTH)
    angle = torch.rand(1, TOKENS, 1, WIDTH // 2)
    given = (hidden, text, embedding, (angle.cos(), angle.sin()))
    if ours is block_forward:
        assert torch.equal(ours(block, *given), block(*given))
    else:
        torch.testing.assert_close(ours(block, *given), block(*given))


@torch.no_grad()
def test_a_pass_is_that_of_diffusers(checkpoint: Path, generator: Generator) -> None:
    """The texts have no padding, for which one token would stand."""
    theirs = WanTransformer3DModel.from_pretrained(checkpoint / "transformer").eval()
    torch.manual_seed(0)
    latents, texts = torch.randn(2, 16, 3, 10, 6), [torch.randn(1, 512, theirs.config.text_dim) for _ in range(2)]
    times = torch.tensor([500, 20])
    expected = theirs(latents, times, torch.cat(texts), return_dict=False)[0]
    model = generator.experts["transformer"]
    for _ in range(2):  # the second one with keys and values from the cache
        found = model(latents, times, texts)
        assert found.shape == latents.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
