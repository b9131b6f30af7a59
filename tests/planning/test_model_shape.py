"""Shapes that are computed without torch are those that the libraries' classes have."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan

from serve_app.compat.model import float32_modules
from serve_app.planning.model_shape import ModelShape
from serve_app.tiny import CHECKPOINT
from serve_app.wan.cost import decode_flops, encode_flops
from serve_app.wan.vae.tiles import levels, levels_of
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.cut import FLOAT32_MODULES

MODEL = ModelShape.published()


def test_modules_that_stay_in_float32() -> None:
    assert float32_modules() == FLOAT32_MODULES


def test_levels_of_a_configuration_are_those_of_its_layers() -> None:
    for model, config in ((MODEL, {}), (ModelShape.of(Checkpoint(CHECKPOINT)), Checkpoint(CHECKPOINT).vae_config)):
        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config(config) if config else AutoencoderKLWan()
        assert levels_of(model.vae) == levels(vae.decoder)


def test_a_decode_of_720p_is_639_tflop() -> None:
    """As torch's counter counted it on a GPU, once for each latent frame."""
    assert round(decode_flops(MODEL.vae, (21, 90, 160)) / 1e12) == 639
    assert 9e12 < encode_flops(MODEL.text) < 12e12
