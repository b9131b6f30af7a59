from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from benchmarks.model.parity import CASES, arguments
from serve_app.request import Params
from serve_app.wan.generate import Generator, generate

BASE = next(iter(CASES.values()))


@pytest.mark.parametrize("case", ["64x64, 9 frames, 8 steps", "high, 1 frame, shift 12"])
def test_frames_equal_wan_pipeline(
    checkpoint: Path, generator: Generator, reference: dict[str, torch.Tensor], case: str
) -> None:
    pipeline = WanPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    latents = reference[case]
    with torch.no_grad():  # the last lines of WanPipeline.__call__
        config = pipeline.vae.config
        mean = torch.tensor(config.latents_mean).view(1, 16, 1, 1, 1)
        inverse = 1.0 / torch.tensor(config.latents_std).view(1, 16, 1, 1, 1)
        video = pipeline.vae.decode(latents / inverse + mean, return_dict=False)[0]
    images = pipeline.video_processor.postprocess_video(video, output_type="pil")[0]
    expected = np.stack([np.asarray(image) for image in images])
    frames = generator.decoder.decode(latents)
    assert frames.dtype == np.uint8
    assert frames.shape == (1, CASES[case].num_frames, CASES[case].height, CASES[case].width, 3)
    different = frames[0].astype(int) - expected
    # Other sums in the same layers: now and then a value on the edge between two levels falls on the other side.
    assert np.abs(different).max() <= 1 and np.count_nonzero(different) < 0.01 * different.size
    assert expected.std() > 5  # a grey picture would be equal whatever the statistics are


def test_layers_for_cpus_change_nothing_but_the_order_of_sums(checkpoint: Path, generator: Generator) -> None:
    latents = torch.randn(1, 16, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    plain = AutoencoderKLWan.from_pretrained(checkpoint / "vae", dtype=torch.float32).eval()
    assert {type(layer) for layer in plain.modules()} != {type(layer) for layer in generator.decoder.vae.modules()}
    with torch.no_grad():
        expected, got = (vae.decode(latents, return_dict=False)[0] for vae in (plain, generator.decoder.vae))
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_end_to_end(checkpoint: Path) -> None:
    params = Params(**{**BASE.model_dump(), "num_inference_steps": 3})
    pipeline = WanPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, flow_shift=params.flow_shift)
    images = pipeline(
        **arguments(params),
        output_type="pil",
    ).frames[0]
    expected = np.stack([np.asarray(image) for image in images]).astype(int)
    assert np.abs(generate(checkpoint, params) - expected).max() <= 1


def test_a_batch_is_as_alone(generator: Generator) -> None:
    latents = torch.randn(3, 16, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    together = generator.decoder.decode(latents).astype(int)
    assert together.shape == (3, 5, 48, 64, 3)
    for row, sample in zip(together, latents, strict=True):
        assert np.abs(row - generator.decoder.decode(sample[None])[0]).max() <= 1
