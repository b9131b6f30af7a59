from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.model.loading import load
from benchmarks.model.rank_memory import MB, SIZES, measure, write_large
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.cut import rank_bytes
from serve_app.wan.weights.writer import prepare


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large(tmp_path_factory.mktemp("large"))


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_holds_and_reads_its_shard_only(large: Path, size: int) -> None:
    whole = sum(file.stat().st_size for file in (large / "transformer").glob("*.safetensors"))
    # Embeddings, the projection of the timestep, queries and outputs of cross-attention are not cut.
    expected = sum(rank_bytes(Checkpoint(large).expert_shape("transformer").tensors(), 4, size).values())
    assert whole / size - MB <= expected <= whole / size + 75 * MB
    for rank in measure(large, size):
        assert rank["shard"] == pytest.approx(expected, abs=MB)
        assert rank["growth"] <= 1.1 * rank["shard"] + 48 * MB
        assert rank["read"] <= rank["shard"] + 2 * MB


def test_half_the_precision_is_half_the_memory(large: Path) -> None:
    for rank in measure(large, 2, "bfloat16"):
        assert rank["growth"] <= 1.1 * rank["shard"] + 48 * MB


def test_a_shard_file_is_read_once_and_nothing_else(large: Path, tmp_path: Path) -> None:
    prepare(Checkpoint(large), tmp_path, 2, "bfloat16", experts=("transformer",))
    for index, rank in enumerate(load("sharded", large, tmp_path, 2, "bfloat16")):
        size = (tmp_path / "transformer" / f"rank-{index}-of-2.safetensors").stat().st_size
        assert rank["shard"] <= size <= rank["read"] <= size + 2 * MB
        assert rank["growth"] <= 1.1 * rank["shard"] + 48 * MB
