"""Random weights of real shapes, which benchmarks at A14B's size use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.model import dummy_checkpoint
from benchmarks.model.parity import run_ranks
from serve_app.config import validate
from serve_app.errors import ConfigError
from serve_app.wan.generate import Generator
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import ProcessGroups, init_process_groups
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import Checkpoint
from tests.wan.sampling.test_sampler import BASE

CPU = torch.device("cpu")
SMALL = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 192, "text_dim": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dummy_checkpoint.write(
        tmp_path_factory.mktemp("dummy") / "model",
        SMALL,
        {"vocab_size": 1024, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
        {"base_dim": 8, "num_res_blocks": 1},
    )


def test_a_folder_of_a14bs_size_takes_no_disk(tmp_path: Path) -> None:
    model = dummy_checkpoint.write(tmp_path / "model")
    files = list(model.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == pytest.approx(2 * 57.15e9 + 11.4e9 + 0.5e9, rel=0.01)
    assert sum(512 * file.stat().st_blocks for file in files) < 20e6
    assert Checkpoint(model).expert_config("transformer_2")["ffn_dim"] == 13824


def test_they_make_a_video(folder: Path) -> None:
    generator = Generator(folder, random=True)
    latents = generator.latents(BASE)
    assert latents.isfinite().all() and latents.std() > 0.1
    frames = generator.decoder.decode(latents)
    assert frames.std() > 0


@pytest.mark.slow
def test_every_rank_draws_its_part_of_the_same(folder: Path, tmp_path: Path) -> None:
    run_ranks(_save_shard, Mesh(tensor=2), folder, tmp_path)
    whole = load_expert(Checkpoint(folder, random=True), "transformer", ProcessGroups.alone(CPU), torch.bfloat16, CPU)
    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, dim in (("blocks.1.attn1.to_q.weight", 0), ("blocks.0.ffn.net.2.weight", 1)):
        assert torch.equal(torch.cat([shard[name] for shard in shards], dim), whole.get_parameter(name))
    # The patch embedding is not cut.
    assert torch.equal(shards[1]["patch_embedding.weight"], whole.get_parameter("patch_embedding.weight"))


def _save_shard(rank: int, mesh: Mesh, port: int, folder: Path, output: Path) -> None:
    torch.set_num_threads(1)
    groups = init_process_groups(rank, mesh, "127.0.0.1", port, CPU, timeout_s=120)
    expert = load_expert(Checkpoint(folder, random=True), "transformer", groups, torch.bfloat16, CPU)
    torch.save(dict(expert.named_parameters()), output / f"{rank}.pt")
    groups.close()


def test_nobody_is_served_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    args: dict[str, Any] = {"model": {"weights": "random"}}
    monkeypatch.delenv("WAN_SERVE_BENCHMARK", raising=False)
    with pytest.raises(ConfigError, match="weights is 'random', expected 'files'"):
        validate(args)
    monkeypatch.setenv("WAN_SERVE_BENCHMARK", "1")
    assert validate(args).model.weights == "random"
    with pytest.raises(ConfigError, match="weights is 'random' and sharded is given"):
        validate({"model": {"weights": "random", "sharded": "x"}})
