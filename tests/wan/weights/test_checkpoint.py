from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from serve_app.errors import CheckpointError
from serve_app.wan.parallel.process_groups import ProcessGroups
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import Checkpoint


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
        ("model_index.json", {"boundary_ratio": 1.5}, "boundary_ratio is 1.5, expected less than or equal to 1"),
        ("model_index.json", {"boundary_ratio": "0.9"}, 'boundary_ratio is "0.9", expected a number'),
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}, '"WanImageToVideoPipeline", expected'),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderKL"]}, "'vae' is of class 'AutoencoderKL', expected"),
        ("model_index.json", {"image_encoder": ["transformers", "CLIPVisionModel"]}, "'image_encoder' is of class"),
        ("vae/config.json", {"scale_factor_spatial": 16}, "scale_factor_spatial is 16, expected 8"),
        (
            "vae/config.json",
            {"temperal_downsample": [True, True, True]},
            "temperal_downsample is .*, expected true twice",
        ),
        ("vae/config.json", {"is_residual": True}, "is_residual is true, expected false"),
        ("vae/config.json", {"latents_std": [1.0] * 15}, "latents_std has 15 numbers, expected 16"),
        ("vae/config.json", {"latents_mean": "0"}, 'latents_mean is "0", expected a list'),
        ("vae/config.json", {"quantization_config": {}}, "quantization_config is {}, expected null"),
        ("transformer/config.json", {"num_layers": "2"}, 'num_layers is "2", expected a whole number'),
        ("transformer/config.json", {"num_layers": 10**9}, "num_layers is 1000000000, expected less than"),
        ("transformer_2/config.json", {"in_channels": 36}, "in_channels is 36, expected 16, the z_dim of the vae"),
        ("transformer/config.json", {"text_dim": 4096}, "text_dim is 4096, expected 64, the d_model of the text_enc"),
        ("transformer/config.json", {"patch_size": [1, 1, 1]}, r"patch_size is \[1, 1, 1\], expected \[1, 2, 2\]"),
        ("text_encoder/config.json", {"d_model": None}, "d_model is null, expected a whole number"),
        ("text_encoder/config.json", {"vocab_size": 3000}, "tokenizer.json: has 3864 tokens, expected at most 3000"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type is \"t5\", expected 'umt5'"),
        ("text_encoder/config.json", {"architectures": []}, "is of class None, expected 'UMT5EncoderModel'"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"}, "tokenizer_class is 'CLIPTokenizer'"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "epsilon"},
            'prediction_type is "epsilon", expected \'f',
        ),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "use_flow_sigmas is false, expected true"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "use_karras_sigmas is true, expected false"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting is true, expected"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding is true, expected false"),
        ("scheduler/scheduler_config.json", {"predict_x0": False}, "predict_x0 is false, expected true"),
        ("scheduler/scheduler_config.json", {"solver_type": "bh1"}, "solver_type is \"bh1\", expected 'bh2'"),
        ("scheduler/scheduler_config.json", {"solver_order": 9}, "solver_order is 9, expected less than or equal to 3"),
        ("scheduler/scheduler_config.json", {"lower_order_final": False}, "lower_order_final is false, expected true"),
        (
            "scheduler/scheduler_config.json",
            {"final_sigmas_type": "one"},
            "final_sigmas_type is \"one\", expected 'zero'",
        ),
        ("scheduler/scheduler_config.json", {"shift_terminal": 0.1}, "shift_terminal is 0.1, expected null"),
        ("scheduler/scheduler_config.json", {"flow_shift": 0}, "flow_shift is 0, expected greater than 0"),
        ("scheduler/scheduler_config.json", {"sigma_data": 0.5}, "sigma_data is 0.5, a field that is not understood"),
    ],
)
def test_another_kind_of_model_is_refused(copy: Path, file: str, changes: dict[str, object], message: str) -> None:
    edit(copy / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(copy)


@pytest.mark.parametrize("field", ["prediction_type", "use_flow_sigmas"])
def test_what_the_scheduler_would_take_for_another_kind_is_asked_for(copy: Path, field: str) -> None:
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != field}))
    with pytest.raises(CheckpointError, match=f"scheduler_config.json: lacks {field}$"):
        Checkpoint(copy)


def test_what_a_newer_scheduler_has_turned_off_is_passed_over(copy: Path) -> None:
    edit(copy / "scheduler" / "scheduler_config.json", use_new_sigmas=False, new_terminal=None)
    Checkpoint(copy)


def test_no_boundary_leaves_all_steps_to_the_first_expert(copy: Path) -> None:
    edit(copy / "model_index.json", boundary_ratio=None)
    found = Checkpoint(copy)
    assert found.has_two_experts and found.boundary_ratio is None


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
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "note": "of another size"})
    assert Checkpoint(copy).revision not in (revision, changed)


def test_weights_that_are_cut_short(copy: Path, alone: ProcessGroups) -> None:
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: has \d+ bytes, expected \d+"):
        load(copy, alone)


def test_weights_of_another_model(copy: Path, alone: ProcessGroups) -> None:
    edit(copy / "transformer" / "config.json", ffn_dim=512)
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.ffn\S+' has shape \(384, 192\), expected \(512, 192\)"):
        load(copy, alone)
    edit(copy / "transformer" / "config.json", ffn_dim=384, num_layers=3)
    with pytest.raises(CheckpointError, match=r"tensor 'blocks\.2\.\S+' is missing"):
        load(copy, alone)
    edit(copy / "transformer" / "config.json", num_layers=1)
    with pytest.raises(CheckpointError, match=r"tensor 'blocks\.1\.\S+' is not expected"):
        load(copy, alone)


def load(folder: Path, groups: ProcessGroups) -> None:
    import torch

    load_expert(Checkpoint(folder), "transformer", groups, torch.float32, groups.device)
