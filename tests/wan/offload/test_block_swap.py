from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.model.parity import CASES, run_ranks
from serve_app.errors import CheckpointError, ConfigError
from serve_app.wan.generate import Generator
from serve_app.wan.offload.block_store import BlockStore, FileBlocks, HostBlocks
from serve_app.wan.offload.block_swap import PASSING_SLOTS, BlockSwap
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import ProcessGroups, init_process_groups
from serve_app.wan.sampling.sampler import advance
from serve_app.wan.transformer.experts import Experts
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import Checkpoint, Expert
from serve_app.wan.weights.sharded import ShardedCheckpoint
from serve_app.wan.weights.writer import prepare
from tests.support import random_checkpoint

CPU = torch.device("cpu")
LAYERS = 7
FUSE = 8192
CASE = CASES["64x64, 9 frames, 8 steps"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with more layers than there are slots to pass through."""
    return random_checkpoint.write(tmp_path_factory.mktemp("deep"), layers=LAYERS)


@pytest.fixture(scope="module")
def generator(deep: Path) -> Generator:
    return Generator(deep)


@pytest.fixture(scope="module")
def sharded(deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded")
    prepare(Checkpoint(deep), out, 1, "float32")
    return out


class LateCopies:
    """Copies that happen as late as they may, and check that nobody still needs what they overwrite.

    `done` counts the passes through blocks; a copy must not begin before the last pass that used its target.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.used: dict[int, int] = {}
        self.waiting: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.count = self.late = 0

    def watch(self, model: Any) -> None:
        def use(block: Any, _: object) -> None:
            # While the block is used, no copy into its memory may be under way.
            where = storage(block)
            assert not any(target.untyped_storage().data_ptr() == where for target, _ in self.waiting.values())
            self.used[where] = self.passes + 1

        for block in model.blocks:
            block.register_forward_pre_hook(use)

    def done(self) -> int:
        self.passes += 1
        return self.passes

    def start(self, target: torch.Tensor, source: torch.Tensor, after: int | None) -> int:
        assert self.used.get(target.untyped_storage().data_ptr(), 0) <= (after or 0)
        self.count += 1
        self.waiting[self.count] = (target, source)
        return self.count

    def wait(self, event: int) -> None:
        for number in [one for one in self.waiting if one <= event]:  # copies finish in order
            target, source = self.waiting.pop(number)
            target.copy_(source)
        self.late += len(self.waiting)  # copies that were started ahead of their use


def storage(block: Any) -> int:
    return next(iter(block.parameters())).untyped_storage().data_ptr()


def experts(
    folder: Path,
    block_swap: BlockSwap,
    sharded: ShardedCheckpoint | None = None,
    groups: ProcessGroups | None = None,
    compiled: bool = False,
) -> Experts:
    checkpoint, own = Checkpoint(folder), groups or ProcessGroups.alone(CPU)

    def load(name: Expert) -> torch.nn.Module:
        return load_expert(
            checkpoint, name, own, torch.float32, CPU, compiled=compiled, sharded=sharded, block_swap=block_swap
        )

    return Experts(checkpoint.experts, load, block_swap)


def denoise(swapped: Experts, generator: Generator) -> torch.Tensor:
    sample = generator.start(CASE)
    while not sample.finished:
        advance(swapped.use(sample.expert), [sample], FUSE)
    return sample.latents


@pytest.fixture(scope="module")
def expected(generator: Generator) -> torch.Tensor:
    return generator.latents(CASE)


@pytest.mark.parametrize("resident_blocks", [None, 0, 1, 4, 5])
def test_swapped_blocks_are_there_when_they_run(
    deep: Path, generator: Generator, expected: torch.Tensor, resident_blocks: int | None
) -> None:
    copies = LateCopies()
    swapped = experts(deep, BlockSwap(CPU, HostBlocks(CPU), resident_blocks, copies=copies))
    for name in swapped.names:
        copies.watch(swapped.use(name))
    for _ in range(2):  # the second video begins where the first ended, in the other expert
        assert torch.equal(denoise(swapped, generator), expected)
    assert copies.late > 0  # a block is copied while another is used

    block = sum(p.nbytes for p in generator.experts["transformer"].blocks[0].parameters())  # type: ignore[index, union-attr, misc]
    whole = sum(p.nbytes for p in generator.experts["transformer"].parameters())
    everywhere = LAYERS if resident_blocks is None else min(LAYERS, resident_blocks + PASSING_SLOTS)
    outside = 2 * (whole - LAYERS * block)
    assert everywhere * block <= swapped.device_bytes - outside < everywhere * (block + 256 * 40)


def test_a_change_of_expert_copies_each_block_once_and_the_same_expert_none(deep: Path, generator: Generator) -> None:
    copies = LateCopies()
    swapped = experts(deep, BlockSwap(CPU, HostBlocks(CPU), copies=copies))
    sample = generator.start(CASE)
    advance(swapped.use("transformer"), [sample], FUSE)
    advance(swapped.use("transformer"), [sample], FUSE)
    assert copies.count == LAYERS
    advance(swapped.use("transformer_2"), [sample], FUSE)
    assert copies.count == 2 * LAYERS


def test_a_pass_that_breaks_off_leaves_blocks_that_the_next_one_can_use(
    deep: Path, generator: Generator, expected: torch.Tensor
) -> None:
    swapped = experts(deep, BlockSwap(CPU, HostBlocks(CPU), 1, copies=LateCopies()))
    for layer in range(LAYERS):
        block: Any = swapped.use("transformer").blocks[layer]  # type: ignore[index, union-attr]
        sample = generator.start(CASE)

        def fail(*_: object) -> None:
            raise RuntimeError("out of memory")

        handle = block.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            advance(swapped.use("transformer"), [sample], FUSE)
        handle.remove()
    assert torch.equal(denoise(swapped, generator), expected)


@pytest.mark.parametrize("resident_blocks", [0, 3])
def test_blocks_in_files(
    deep: Path, generator: Generator, expected: torch.Tensor, sharded: Path, resident_blocks: int
) -> None:
    store = FileBlocks(CPU)
    swapped = experts(
        deep, BlockSwap(CPU, store, resident_blocks), ShardedCheckpoint(sharded, Checkpoint(deep), 1, "float32")
    )
    assert torch.equal(denoise(swapped, generator), expected)


@pytest.fixture
def damaged(deep: Path, sharded: Path) -> Iterator[Path]:
    """A sharded checkpoint with one bit of the file of `transformer` flipped."""
    file = sharded / "transformer" / "rank-0-of-1.safetensors"
    whole = file.read_bytes()
    at = len(whole) // 2
    with file.open("r+b") as stream:
        os.pwrite(stream.fileno(), bytes([whole[at] ^ 1]), at)
    yield sharded
    file.write_bytes(whole)


def test_a_damaged_file_fails_the_step_with_its_name_until_it_is_mended(
    deep: Path, generator: Generator, damaged: Path, expected: torch.Tensor
) -> None:
    store: BlockStore = FileBlocks(CPU)
    swapped = experts(deep, BlockSwap(CPU, store), ShardedCheckpoint(damaged, Checkpoint(deep), 1, "float32"))
    sample = generator.start(CASE)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"rank-0-of-1.safetensors: the tensor 'blocks\..* has checksum"):
            advance(swapped.use("transformer"), [sample], FUSE)
        assert sample.step == 0
    file = damaged / "transformer" / "rank-0-of-1.safetensors"
    at = file.stat().st_size // 2
    with file.open("r+b") as stream:
        byte = os.pread(stream.fileno(), 1, at)[0]
        os.pwrite(stream.fileno(), bytes([byte ^ 1]), at)
    assert torch.equal(denoise(swapped, generator), expected)


def test_as_many_blocks_are_resident_as_the_budget_allows(
    deep: Path, generator: Generator, expected: torch.Tensor
) -> None:
    block_swap = BlockSwap(CPU, HostBlocks(CPU))
    experts(deep, block_swap)
    block = block_swap.device_bytes / LAYERS
    for budget, count in ((2 * block, 2), (4.5 * block, 4), (LAYERS * block, LAYERS), (100 * block, LAYERS)):
        block_swap = BlockSwap(CPU, HostBlocks(CPU), budget_bytes=budget)
        swapped = experts(deep, block_swap)
        assert block_swap.device_bytes == count * block
        assert torch.equal(denoise(swapped, generator), expected)


def test_a_budget_too_small_for_blocks_to_pass_through(deep: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^denoiser.memory_fraction leaves 0 MiB for blocks .*, expected [1-9]\d* MiB or more, for 2"
    ):
        experts(deep, BlockSwap(CPU, HostBlocks(CPU), budget_bytes=-1e9))


def test_shards_are_swapped_as_well(deep: Path) -> None:
    run_ranks(_compare, Mesh(tensor=2), deep)


def _compare(rank: int, mesh: Mesh, port: int, folder: Path) -> None:
    """Denoise with and without block swap on one group, and fail if a bit differs."""
    torch.set_num_threads(1)
    groups = init_process_groups(rank, mesh, "127.0.0.1", port, CPU, timeout_s=120)
    generator = Generator(folder, groups=groups)
    swapped = experts(folder, BlockSwap(CPU, HostBlocks(CPU), 1), groups=groups)
    assert torch.equal(denoise(swapped, generator), generator.latents(CASE))
    groups.close()


def test_compiled_blocks_are_swapped_without_being_compiled_again(
    deep: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    try:
        resident = denoise(experts(deep, BlockSwap(CPU, HostBlocks(CPU)), compiled=True), generator)
        counters.clear()
        assert torch.equal(
            denoise(experts(deep, BlockSwap(CPU, HostBlocks(CPU), 1), compiled=True), generator), resident
        )
        assert counters["stats"]["unique_graphs"] == 0
    finally:
        torch._dynamo.reset()
