"""What is compiled serves every layer, prompt, size and batch, and both experts, once it has seen sizes change."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.parity import relative_error
from serve_app.request import Params
from serve_app.wan.generate import Generator
from serve_app.wan.sample import Sample
from serve_app.wan.sampler import advance
from serve_app.wan.warm_up import warm_up
from tests.wan.test_sampler import BASE


@pytest.fixture
def compiled(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Generator]:
    """Both experts, traced and guarded as on a GPU, but run as they are."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield Generator(checkpoint, compiled=True)
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def changed(**fields: object) -> Params:
    return Params(**{**BASE.model_dump(), **fields})


def step(generator: Generator, samples: list[Sample], fuse: int = 8192) -> None:
    advance(generator.experts[samples[0].expert], samples, fuse)


def test_a_step_is_the_step_without(compiled: Generator, generator: Generator) -> None:
    ours, theirs = (one.latents(BASE) for one in (compiled, generator))
    assert relative_error(ours, theirs) <= 1e-5


def test_after_the_warm_up_nothing_is_compiled_any_more(compiled: Generator) -> None:
    counters.clear()
    for expert in compiled.experts.values():
        warm_up(expert, compiled.checkpoint, BASE, 3, 8192, torch.float32, compiled=True)
    made = graphs()
    assert 0 < made <= 4, "as many for all layers of both experts"
    requests = [
        BASE,
        changed(prompt="蓝色的星星", seed=5),
        changed(width=96, height=48),
        changed(num_frames=17),
        changed(num_frames=1, guidance_scale=1.0, guidance_scale_2=1.0),
        changed(width=128, height=80, num_frames=5),
    ]
    for params in requests:
        for batch in (1, 2, 3):
            for fuse in (0, 8192):
                step(compiled, [compiled.start(params) for _ in range(batch)], fuse)
    sample = compiled.start(BASE)
    while not sample.finished:
        step(compiled, [sample])
    assert graphs() == made
