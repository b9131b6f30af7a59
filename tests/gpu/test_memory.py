"""What only a device with memory of its own can show: samples that leave it, and experts that take turns on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.parity import CASES
from serve_app.wan.checkpoint import Checkpoint
from serve_app.wan.experts import Experts
from serve_app.wan.parallel import load_expert
from serve_app.wan.sample import Sample
from serve_app.wan.sampler import denoise
from serve_app.wan.text import Embedding
from serve_app.wan.world import World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PARAMS = next(iter(CASES.values()))


def experts(folder: Path, placement: str) -> Experts:
    checkpoint, device = Checkpoint(folder), torch.device("cuda", 0)
    world = World.alone(device)
    load = lambda name: load_expert(checkpoint, name, world, torch.bfloat16, device)  # noqa: E731
    return Experts(checkpoint.experts, load, placement, device)  # type: ignore[arg-type]


def sample(folder: Path) -> Sample:
    text = Embedding(torch.ones(3, 64), 3, False)
    return Sample.start(PARAMS, Checkpoint(folder), text, text, torch.device("cuda", 0), torch.bfloat16)


class Using(dict[str, torch.nn.Module]):
    """The experts as `denoise` wants them: made ready when they are asked for."""

    def __init__(self, those: Experts) -> None:
        self._those = those

    def __getitem__(self, name: str) -> torch.nn.Module:
        return self._those.use(name)  # type: ignore[arg-type]


def test_a_sample_that_leaves_the_device_and_comes_back_after_each_step_is_the_same(checkpoint: Path) -> None:
    both = Using(experts(checkpoint, "together"))
    expected = denoise(both, sample(checkpoint))

    def away_and_back(one: Sample) -> None:
        before = torch.cuda.memory_allocated()
        one.to(torch.device("cpu"))
        assert torch.cuda.memory_allocated() < before
        one.to(torch.device("cuda", 0))

    assert torch.equal(denoise(both, sample(checkpoint), away_and_back), expected)


def test_experts_that_take_turns_hold_half_and_give_the_same(checkpoint: Path) -> None:
    together = experts(checkpoint, "together")
    expected = denoise(Using(together), sample(checkpoint))
    swap = experts(checkpoint, "swap")
    assert swap.device_bytes == 0
    assert torch.equal(denoise(Using(swap), sample(checkpoint)), expected)
    assert swap.device_bytes == together.device_bytes // 2
