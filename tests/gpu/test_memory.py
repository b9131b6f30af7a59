"""Tests of a device's own memory: samples that leave it, and experts that take turns on it."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.model.parity import CASES
from serve_app.compute import limit_memory, pick_device
from serve_app.wan.offload.block_store import FileBlocks, HostBlocks, host_memory
from serve_app.wan.offload.block_swap import BlockSwap
from serve_app.wan.parallel.process_groups import ProcessGroups
from serve_app.wan.sampling.sample import Sample
from serve_app.wan.sampling.sampler import denoise
from serve_app.wan.text import Embedding
from serve_app.wan.transformer.experts import Experts
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import Checkpoint, Expert
from serve_app.wan.weights.sharded import ShardedCheckpoint
from serve_app.wan.weights.writer import prepare
from tests.support import random_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PARAMS = next(iter(CASES.values()))


DEVICE = torch.device("cuda", 0)


def experts(folder: Path, slots: BlockSwap | None = None, sharded: ShardedCheckpoint | None = None) -> Experts:
    checkpoint, world = Checkpoint(folder), ProcessGroups.alone(DEVICE)

    def load(name: Expert) -> torch.nn.Module:
        return load_expert(checkpoint, name, world, torch.bfloat16, DEVICE, sharded=sharded, block_swap=slots)

    return Experts(checkpoint.experts, load, slots)


def sample(folder: Path) -> Sample:
    text = Embedding(torch.ones(3, 64), 3, False)
    return Sample.start(PARAMS, Checkpoint(folder), text, text, torch.device("cuda", 0), torch.bfloat16)


class Using(dict[Any, torch.nn.Module]):
    """The experts as `denoise` wants them: made ready when they are asked for."""

    def __init__(self, those: Experts) -> None:
        self._those = those

    def __getitem__(self, name: Any) -> torch.nn.Module:
        return self._those.use(name)


def test_a_sample_that_leaves_the_device_and_comes_back_after_each_step_is_the_same(checkpoint: Path) -> None:
    both = Using(experts(checkpoint))
    expected = denoise(both, sample(checkpoint))

    def away_and_back(one: Sample) -> None:
        before = torch.cuda.memory_allocated()
        one.to(torch.device("cpu"))
        assert torch.cuda.memory_allocated() < before
        one.to(torch.device("cuda", 0))

    assert torch.equal(denoise(both, sample(checkpoint), away_and_back), expected)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with more layers than pass through at once."""
    return random_checkpoint.write(tmp_path_factory.mktemp("deep"), layers=9)


@pytest.mark.parametrize("staying", [None, 0, 4])
def test_blocks_in_host_memory_that_take_turns(deep: Path, staying: int | None) -> None:
    expected = denoise(Using(experts(deep)), sample(deep))
    slots = BlockSwap(DEVICE, HostBlocks(DEVICE), staying)
    those = Using(experts(deep, slots))
    assert slots.device_bytes < experts(deep).device_bytes * 0.55
    for _ in range(3):
        assert torch.equal(denoise(those, sample(deep)), expected)


def test_blocks_in_files_that_take_turns(deep: Path, tmp_path: Path) -> None:
    expected = denoise(Using(experts(deep)), sample(deep))
    checkpoint = Checkpoint(deep)
    prepare(checkpoint, tmp_path / "out", 1, "bfloat16")
    sharded = ShardedCheckpoint(tmp_path / "out", checkpoint, 1, "bfloat16")
    those = Using(experts(deep, BlockSwap(DEVICE, FileBlocks(DEVICE), 2), sharded))
    for _ in range(3):
        assert torch.equal(denoise(those, sample(deep)), expected)


def test_memory_for_blocks_is_pinned_and_no_larger_than_they_are() -> None:
    memory = host_memory(12345, DEVICE)
    assert memory.is_pinned()
    assert memory.untyped_storage().nbytes() == 12345


def test_memory_that_was_pinned_is_like_any_other_when_it_is_gone() -> None:
    size = 1 << 26
    memory = host_memory(size, torch.device("cuda"))
    address = memory.data_ptr()
    del memory
    later = torch.frombuffer(mmap.mmap(-1, 4 * size), dtype=torch.uint8)
    assert later.data_ptr() < address + size and address < later.data_ptr() + later.nbytes, "it lies elsewhere"
    later.to("cuda")  # CUDA refuses a copy of which a part is pinned


def test_a_process_stays_within_its_share_of_the_device() -> None:
    whole = torch.cuda.get_device_properties(DEVICE).total_memory
    try:
        allowed = limit_memory(DEVICE, 0.1)
        assert allowed == pytest.approx(0.1 * whole)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.2 * whole), dtype=torch.uint8, device=DEVICE)
    finally:
        limit_memory(DEVICE, 1.0)


def test_the_device_that_is_picked_by_itself_can_be_limited() -> None:
    picked = pick_device("auto")
    try:
        assert limit_memory(picked, 0.5) == pytest.approx(0.5 * torch.cuda.get_device_properties(DEVICE).total_memory)
    finally:
        limit_memory(picked, 1.0)
