"""Tensors computed from configurations equal the parameters of the libraries' classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from benchmarks.model.dummy_checkpoint import A14B, XXL
from serve_app.tiny import CHECKPOINT
from serve_app.wan.weights.tensors import ExpertConfig, TextConfig, VaeConfig, Weighted

_EXPERT = A14B | {"num_layers": 2}
_CONFIGS = {ExpertConfig: "transformer", TextConfig: "text_encoder", VaeConfig: "vae"}


def built(kind: type[Weighted], config: dict[str, Any]) -> nn.Module:
    """Return the library's model, without memory for its parameters."""
    known = {name: value for name, value in config.items() if name in kind.model_fields}
    with torch.device("meta"):
        if kind is TextConfig:
            return UMT5EncoderModel(UMT5Config(**known))
        return WanTransformer3DModel(**known) if kind is ExpertConfig else AutoencoderKLWan(**known)


def compare(kind: type[Weighted], config: dict[str, Any]) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in built(kind, config).named_parameters()}
    assert kind.model_validate(config).tensors() == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param(ExpertConfig, A14B, id="A14B"),
        pytest.param(ExpertConfig, _EXPERT | {"cross_attn_norm": False, "out_channels": None}, id="expert"),
        pytest.param(TextConfig, XXL, id="umt5-xxl"),
        pytest.param(TextConfig, {"feed_forward_proj": "relu", "vocab_size": 9}, id="text, no gates"),
        pytest.param(VaeConfig, {}, id="Wan2.1's VAE"),
        pytest.param(
            VaeConfig, {"attn_scales": [0.5, 1.0], "decoder_base_dim": 32, "dim_mult": [1, 1, 3, 2]}, id="VAE"
        ),
        pytest.param(VaeConfig, {"temperal_downsample": [True, True, False], "num_res_blocks": 1}, id="VAE, early"),
    ],
)
def test_published_and_other_configurations(kind: type[Weighted], config: dict[str, Any]) -> None:
    compare(kind, config)


@pytest.mark.parametrize("kind", list(_CONFIGS), ids=lambda kind: kind.__name__)
def test_the_folders_at_hand(checkpoint: Path, kind: type[Weighted]) -> None:
    for folder in (checkpoint, CHECKPOINT):
        compare(kind, json.loads((folder / _CONFIGS[kind] / "config.json").read_text()))
