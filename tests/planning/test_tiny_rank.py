"""The memory of a rank of the tiny model, by the model and as its tensors take it."""

from __future__ import annotations

import pytest
import torch

from serve_app.config import Config
from serve_app.planning.memory import STEP, TEXTS, RankMemory, Size
from serve_app.planning.model_shape import ModelShape
from serve_app.tiny import CHECKPOINT
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import ProcessGroups
from serve_app.wan.sampling.sampler import predict
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import MAX_TOKENS, Checkpoint
from tests.support.live_bytes import LiveBytes

NEAR = 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_of_the_tiny_model(dtype: str) -> None:
    """On the `meta` device, whose operations make tensors of every size and compute nothing."""
    meta, kind = torch.device("meta"), getattr(torch, dtype)
    checkpoint = Checkpoint(CHECKPOINT)
    expert = load_expert(checkpoint, "transformer", ProcessGroups.alone(meta), kind, meta)
    for block in expert.blocks:
        for attention in (block.attn1, block.attn2):  # the one for `meta` makes the whole table of scores
            attention.processor.kernel = lambda query, *_: torch.empty_like(query)
    model = ModelShape.of(checkpoint)
    for width, height, frames in ((128, 128, 33), (832, 480, 81)):
        for fuse in (0, 2):
            config = Config.model_validate(
                {
                    "model": {"dtype": dtype},
                    "defaults": {"width": width, "height": height, "num_frames": frames},
                    "denoiser": {"fuse_guidance_tokens": 10**6 if fuse else 0, "experts": "split"},
                }
            )
            found = RankMemory(config, model, Mesh(), (0,)).need(Size.of(config.defaults))
            expert.text_cache.clear()
            shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
            texts = [torch.empty(1, MAX_TOKENS, 128, device=meta, dtype=kind) for _ in range(2)]
            with LiveBytes() as live, torch.no_grad():
                latents, timesteps = torch.empty(shape, device=meta, dtype=kind), torch.empty(1, device=meta)
                for _ in range(2):  # the second one finds the keys and values of the texts
                    predict(expert, latents, timesteps, texts[:1], texts[1:], [4.0], fuse)
            weights = sum(p.nbytes for p in expert.parameters())
            assert found.weights == weights
            assert found.bytes_of(TEXTS) == expert.text_cache.bytes
            assert found.bytes_of(STEP, TEXTS) == pytest.approx(live.peak, rel=NEAR), (width, fuse)
