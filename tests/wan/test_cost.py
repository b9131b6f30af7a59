from __future__ import annotations

from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from serve_app.wan.cost import activation_bytes, latent_tokens, step_flops, video_tflop
from serve_app.wan.generate import Generator
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.sampling.sampler import advance
from tests.support.shapes import A14B
from tests.wan.sampling.test_sampler import BASE, Params


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("width", [64, 192])
def test_flops_are_those_that_torch_counts(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, guidance: float, width: int
) -> None:
    sample = generator.start(Params(**{**BASE.model_dump(), "guidance_scale": guidance, "width": width}))
    model: Any = generator.experts["transformer"]
    monkeypatch.setattr(model.text_cache, "_fold", False)  # as on a GPU
    model.text_cache.clear()
    advance(model, [sample], fuse_guidance_tokens=0)  # makes the text's keys and values
    # The fused kernel for CPUs is one that the counter does not know.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        advance(model, [sample], fuse_guidance_tokens=0)
    counted = counter.get_total_flops()
    ours = step_flops(dict(model.config), sample.tokens, sample.guided)
    # The random model is all edges: its patch embedding, left out in ours, weighs as it does in no real one.
    assert 0.75 * counted <= ours <= counted


def test_a_720p_clip_of_a14b_is_13_pflop_a_step() -> None:
    assert step_flops(A14B, 75_600, guided=True) == pytest.approx(13e15, rel=0.05)
    size = {"width": 1280, "height": 720, "num_frames": 81, "num_inference_steps": 40}
    params = Params(**{**BASE.model_dump(), **size, "guidance_scale": 4.0})
    assert latent_tokens(A14B, params.latent_shape) == 75_600
    assert video_tflop(A14B, params) == pytest.approx(40 * 13e3, rel=0.05)
    assert video_tflop(A14B, params.model_copy(update={"guidance_scale": 1.0})) == video_tflop(A14B, params) / 2


@pytest.mark.parametrize(
    ("tokens", "compiled", "peak_gb"), [(32_760, False, 32.9), (75_600, False, 37.8), (75_600, True, 33.7)]
)
def test_activations_of_a14b_are_near_what_was_measured(tokens: int, compiled: bool, peak_gb: float) -> None:
    """Peaks of one H200, in bfloat16, with 28.6 GB of weights and 0.4 of a text's keys and values.

    From benchmarks/results/2026-11-24-a14b-1xh200.md and 2026-11-27-a14b-shared-tokens-4xh200.md.
    """
    measured = (peak_gb - 28.6 - 0.4) * 1e9
    assert activation_bytes(A14B, tokens, 2, Mesh(), compiled) == pytest.approx(measured, rel=0.05)


def test_ranks_share_activations() -> None:
    """21.8 GB with 14.3 GB of weights, on each of two H200s (bfloat16, DeepSpeed, not compiled)."""
    assert activation_bytes(A14B, 75_600, 2, Mesh(tensor=2)) == pytest.approx(7.1e9, rel=0.15)


def test_the_estimate_grows_with_the_tokens() -> None:
    nothing, some, twice = (activation_bytes(A14B, tokens, 2, Mesh()) for tokens in (0, 100, 200))
    assert twice - some == pytest.approx(some - nothing, abs=1)
