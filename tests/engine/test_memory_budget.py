from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.model import dummy_checkpoint
from serve_app.config import Config
from serve_app.engine.memory_budget import MemoryBudget
from serve_app.errors import ConfigError
from serve_app.wan.cost import symmetric_bytes
from serve_app.wan.offload.block_store import FileBlocks, HostBlocks
from serve_app.wan.offload.block_swap import BlockSwap
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.weights.checkpoint import Checkpoint
from tests.support.shapes import A14B

CPU, GPU = torch.device("cpu"), torch.device("meta")  # any that is not a CPU will do
GB = 1e9


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dummy_checkpoint.write(tmp_path_factory.mktemp("dummy") / "a14b")


ONE = Mesh()


def budget(folder: Path, mesh: Mesh = ONE, width: int = 832, height: int = 480, **denoiser: Any) -> MemoryBudget:
    size = {"width": width, "height": height}
    config = Config.model_validate(
        {"model": {"path": str(folder), "sharded": "/x"}, "defaults": size, "denoiser": denoiser}
    )
    checkpoint = Checkpoint(folder)
    experts = checkpoint.experts[:1] if config.denoiser.experts == "split" else checkpoint.experts
    return MemoryBudget(config, checkpoint, experts, mesh)


def test_weights_of_a14b(a14b: Path) -> None:
    """14.29 billion parameters in bfloat16 each, of which 0.24 billion are not in blocks."""
    assert budget(a14b).weight_bytes == pytest.approx(57.2 * GB, rel=0.01)
    assert budget(a14b, experts="split").weight_bytes == pytest.approx(28.6 * GB, rel=0.01)
    assert budget(a14b, experts="swap").weight_bytes == pytest.approx(29.1 * GB, rel=0.01)
    whole = 2 * (40 * 2 * 5120**2 * 2) + 1.0 * GB  # of cross-attention two layers, and what is outside of blocks
    for tensor in (2, 4):
        each = budget(a14b, Mesh(tensor=tensor)).weight_bytes
        assert each == pytest.approx((57.2 * GB - whole) / tensor + whole, rel=0.01)
    assert budget(a14b, Mesh(guidance=2, sequence=2)).weight_bytes == budget(a14b).weight_bytes


def test_what_does_not_fit_is_refused_before_anything_is_loaded(a14b: Path) -> None:
    everything = budget(a14b)
    everything.check_fits(64 * GB)
    with pytest.raises(
        ConfigError,
        match=r"^denoiser\.memory_fraction has value 0\.9, 46\.6 GiB of this GPU, expected 5\d\.\d GiB for weights "
        r"\(53\.\d\) and a step of 832x480, 81 frames; denoiser\.experts, \.offload and \.parallel\.tensor",
    ):
        everything.block_swap(50 * GB, GPU)
    budget(a14b, Mesh(tensor=2)).check_fits(50 * GB)
    budget(a14b, experts="swap").check_fits(50 * GB)
    with pytest.raises(ConfigError, match=r"18\.6 GiB of this GPU, expected 33\.2"):
        budget(a14b, experts="swap").check_fits(20 * GB)


@pytest.mark.parametrize(
    ("experts", "tensor", "at_480p", "at_720p"),
    [
        ("together", 1, 62.5, 65.6),
        ("swap", 1, 34.4, 37.5),
        ("split", 1, 32.9, 35.9),
        ("together", 2, 38.0, 40.0),
    ],
)
def test_what_is_said_to_fit_is_what_was_seen_to(
    a14b: Path, experts: str, tensor: int, at_480p: float, at_720p: float
) -> None:
    """Gigabytes that the allocator held on GPUs for A14B, compiled, 81 frames.

    benchmarks/results/2026-11-25-a14b-2xh100.md, 2026-11-26-a14b-2xh200.md, 2026-11-28-a14b-cross-attention-2xh200.md.
    """
    for (width, height), seen in (((832, 480), at_480p), ((1280, 720), at_720p)):
        # Beyond what the allocator held, ranks that share weights hold memory to exchange results through.
        exchanged = symmetric_bytes(A14B, width * height // 256 * 21, 2, Mesh(tensor=tensor))
        needed = budget(a14b, Mesh(tensor=tensor), width, height, experts=experts, compile=True)
        with pytest.raises(ConfigError):
            needed.check_fits(0.97 * seen * GB + exchanged)
        needed.check_fits(1.03 * seen * GB + exchanged)


def test_texts_count_as_far_as_they_are_kept(a14b: Path) -> None:
    """Two texts of 2 x 40 layers x 512 tokens x 5120 features x 2 bytes for each expert, on all of its ranks."""
    for mesh, texts in ((ONE, 4), (Mesh(guidance=2), 2), (Mesh(tensor=2), 4)):
        more = _least(budget(a14b, mesh)) - _least(budget(a14b, mesh, text_cache_mib=0))
        assert more == pytest.approx(texts * 0.419 * GB, rel=0.01)
    more = _least(budget(a14b, text_cache_mib=100)) - _least(budget(a14b, text_cache_mib=0))
    assert more == pytest.approx(2 * 100 * 2**20, rel=0.01)


def _least(budget: MemoryBudget) -> float:
    """Return the bytes that `check_fits` wants."""
    low, high = 0.0, 100 * GB
    while high - low > 1e5:
        middle = (low + high) / 2
        try:
            budget.check_fits(middle)
            high = middle
        except ConfigError:
            low = middle
    return high


def test_where_blocks_wait(a14b: Path) -> None:
    assert budget(a14b).block_swap(float("inf"), GPU) is None
    assert budget(a14b, experts="split").block_swap(float("inf"), GPU) is None
    assert budget(a14b, experts="swap").block_swap(float("inf"), CPU) is None
    for offload, store in (("cpu", HostBlocks), ("disk", FileBlocks)):
        block_swap = budget(a14b, experts="swap", offload=offload, compile=True).block_swap(40 * GB, CPU)
        assert isinstance(block_swap, BlockSwap) and isinstance(block_swap._store, store)
        # Of 40 GB: less the largest request (720p, 161 frames), the allocator's slack, texts, waiting samples and what
        # is not in blocks.
        left = 40 - 9.3 - 3.7 - 2 * 1.07 - 4.29 - 0.97
        assert block_swap._budget_bytes / GB == pytest.approx(left, abs=0.3)
