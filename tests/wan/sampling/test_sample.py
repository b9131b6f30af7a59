from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from benchmarks.model.parity import CASES
from serve_app.request import Params
from serve_app.wan.generate import Generator
from serve_app.wan.sampling.sample import Sample
from serve_app.wan.text import Embedding
from serve_app.wan.weights.checkpoint import Checkpoint

BASE = next(iter(CASES.values()))
CPU = torch.device("cpu")
TEXT = Embedding(torch.ones(3, 64), 3, False)


def start(checkpoint: Path, negative: Embedding | None = TEXT, **changes: object) -> Sample:
    params = Params(**{**BASE.model_dump(), **changes})
    return Sample.start(params, Checkpoint(checkpoint), TEXT, negative, CPU, torch.float32, name="job-1")


def test_noise_is_that_of_wan_pipeline(checkpoint: Path) -> None:
    sample = start(checkpoint, seed=2**40, width=96, num_frames=13)
    pipeline = WanPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    generator = torch.Generator("cpu").manual_seed(2**40)
    expected = pipeline.prepare_latents(1, 16, 64, 96, 13, torch.float32, CPU, generator)
    assert torch.equal(sample.latents, expected)
    assert not torch.equal(sample.latents, start(checkpoint, seed=2, width=96, num_frames=13).latents)


def test_size(checkpoint: Path) -> None:
    sample = start(checkpoint, width=96, height=64, num_frames=13)
    assert sample.latents.shape == (1, 16, 4, 8, 12)
    assert sample.tokens == 4 * 4 * 6
    assert sample.steps == 8
    assert sample.positive.shape == (1, 512, 64)


def test_experts_change_at_the_boundary(checkpoint: Path) -> None:
    sample = start(checkpoint, num_inference_steps=40, flow_shift=12.0)
    assert sample.boundary_step == 26
    experts = []
    while not sample.finished:
        high = sample.timestep >= 875
        assert sample.expert == ("transformer" if high else "transformer_2")
        assert sample.guidance == (BASE.guidance_scale if high else BASE.guidance_scale_2)
        experts.append(sample.expert)
        sample.step += 1
    assert experts == 26 * ["transformer"] + 14 * ["transformer_2"]  # as the Wan2.2 release splits 40 steps at shift 12


def test_one_expert_does_all_steps(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Checkpoint(checkpoint)
    folder.has_two_experts = False
    sample = Sample.start(BASE, folder, TEXT, TEXT, CPU, torch.float32)
    sample.step = sample.steps - 1
    assert sample.expert == "transformer"
    assert sample.boundary_step == sample.steps


def test_guidance_off(checkpoint: Path) -> None:
    sample = start(checkpoint, negative=None, guidance_scale=1.0)
    assert not sample.guided
    assert sample.negative is None
    with pytest.raises(ValueError, match=r"'job-1': guidance 4\.0 needs a negative embedding"):
        start(checkpoint, negative=None)


def test_cohorts(checkpoint: Path) -> None:
    base = start(checkpoint)
    assert start(checkpoint, seed=9, guidance_scale=7.0, num_inference_steps=20, flow_shift=3.0).cohort == base.cohort
    for change in ({"width": 80}, {"num_frames": 5}, {"guidance_scale": 1.0}):
        assert start(checkpoint, **change).cohort != base.cohort
    late = start(checkpoint)
    late.step = late.steps - 1
    assert late.cohort != base.cohort


def test_a_finished_sample_has_no_next_step(generator: Generator) -> None:
    sample = generator.start(Params(**{**BASE.model_dump(), "num_inference_steps": 1}))
    sample.apply(torch.zeros_like(sample.latents))
    assert sample.finished
    with pytest.raises(IndexError):
        _ = sample.expert
