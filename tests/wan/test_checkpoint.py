from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from serve_app.errors import CheckpointError
from serve_app.wan.checkpoint import Checkpoint
from serve_app.wan.parallel import load_expert
from serve_app.wan.world import World


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_in_a_folder(checkpoint: Path) -> None:
    found = Checkpoint(checkpoint)
    assert found.has_two_experts
    assert found.experts == ("transformer", "transformer_2")
    assert found.boundary_ratio == 0.875
    assert found.num_train_timesteps == 1000
    assert found.expert_config("transformer_2")["num_attention_heads"] == 8
    assert len(found.vae_config["latents_mean"]) == 16
    assert found.scheduler_config["prediction_type"] == "flow_prediction"


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer_2/config.json",
        "transformer_2/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: is missing, expected") as error:
        Checkpoint(copy)
    assert "\n" not in str(error.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: is not a folder"):
        Checkpoint(tmp_path / "nowhere")


def test_a_lost_shard_is_named(copy: Path) -> None:
    index = copy / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "lost.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"vae/lost\.safetensors: is missing"):
        Checkpoint(copy)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}, "'EulerDiscreteScheduler'"),
        ("transformer/config.json", {"image_dim": 1280}, "image_dim is 1280, expected null"),
        ("model_index.json", {"expand_timesteps": True}, "expand_timesteps is true"),
        ("model_index.json", {"boundary_ratio": None}, "boundary_ratio is missing"),
        ("vae/config.json", {"scale_factor_spatial": 16}, "scale_factor_spatial is 16, expected 8"),
    ],
)
def test_another_kind_of_model_is_refused(copy: Path, file: str, changes: dict[str, object], message: str) -> None:
    edit(copy / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(copy)


def test_one_expert_is_enough(copy: Path) -> None:
    shutil.rmtree(copy / "transformer_2")
    edit(copy / "model_index.json", transformer_2=[None, None], boundary_ratio=None)
    found = Checkpoint(copy)
    assert not found.has_two_experts
    assert found.boundary_ratio is None
    with pytest.raises(CheckpointError, match="has one expert only"):
        found.expert_config("transformer_2")


def test_revision_follows_the_content(checkpoint: Path, copy: Path) -> None:
    revision = Checkpoint(checkpoint).revision
    assert Checkpoint(copy).revision == revision
    edit(copy / "transformer" / "config.json", eps=1e-5)
    changed = Checkpoint(copy).revision
    assert changed != revision
    with (copy / "vae" / "diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"x")
    assert Checkpoint(copy).revision not in (revision, changed)


def test_weights_that_are_cut_short(copy: Path, alone: World) -> None:
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: has \d+ bytes, expected \d+"):
        load(copy, alone)


def test_weights_of_another_model(copy: Path, alone: World) -> None:
    edit(copy / "transformer" / "config.json", ffn_dim=512)
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.ffn\S+' has shape \(384, 192\), expected \(512, 192\)"):
        load(copy, alone)
    edit(copy / "transformer" / "config.json", ffn_dim=384, num_layers=3)
    with pytest.raises(CheckpointError, match=r"tensor 'blocks\.2\.\S+' is missing"):
        load(copy, alone)
    edit(copy / "transformer" / "config.json", num_layers=1)
    with pytest.raises(CheckpointError, match=r"tensor 'blocks\.1\.\S+' is not expected"):
        load(copy, alone)


def load(folder: Path, world: World) -> None:
    import torch

    load_expert(Checkpoint(folder), "transformer", world, torch.float32, world.device)
