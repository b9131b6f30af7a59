"""The cost of denoising, from the shape of the model alone: floating-point operations and bytes.

Knows neither devices nor measurements. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from serve_app.request import Params
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.weights.checkpoint import MAX_TOKENS


def latent_tokens(config: dict[str, Any], latent_shape: Sequence[int]) -> int:
    """Return the number of tokens of one sample after patching.

    Args:
        config: an expert's configuration.
        latent_shape: frames, height and width.
    """
    return math.prod(side // patch for side, patch in zip(latent_shape, config["patch_size"], strict=True))


def video_tflop(config: dict[str, Any], params: Params) -> float:
    """Return the TFLOP (10^12 floating-point operations) of all denoising steps of a video, guidance included.

    Both experts of a checkpoint are taken to be of one shape. Left out are the VAE and the text encoder, whose part is
    the same for every video.

    Args:
        config: an expert's configuration.
        params: the video's size, steps and guidance.
    """
    tokens = latent_tokens(config, params.latent_shape)
    return params.num_inference_steps * step_flops(config, tokens, params.guided) / 1e12


def step_flops(config: dict[str, Any], tokens: int, guided: bool) -> float:
    """Return the floating-point operations of one denoising step of one sample, on all ranks together.

    Counts matrix products and attention, a multiplication and an addition as two; all else is a few per cent. The keys
    and values of the text are left out: they are made once for many steps (see `TextCache`).

    Args:
        config: an expert's configuration.
        tokens: latent tokens after patching.
        guided: whether the step has both halves of guidance.
    """
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    ffn, layers = int(config["ffn_dim"]), int(config["num_layers"])
    projections = 2 * tokens * (6 * width**2 + 2 * width * ffn)
    attention = 4 * tokens * (tokens + MAX_TOKENS) * width
    return float(layers * (projections + attention)) * (2 if guided else 1)


def activation_bytes(config: dict[str, Any], tokens: int, itemsize: int, mesh: Mesh, compiled: bool = False) -> int:
    """Return the bytes that a forward pass needs on one rank, beside the weights and the texts' keys and values.

    A block needs most at the hidden features of the feed-forward: this rank's share of them, beside six tensors of the
    model's width. Norms, modulation and RoPE compute in float32, whatever the model's dtype: compiled, they keep none
    of it; else their steps are tensors of their own, which for a half-precision model are three more of its width.
    """
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    wide = 6 if compiled or itemsize >= 4 else 9
    return tokens * itemsize * (int(config["ffn_dim"]) // mesh.tensor + wide * width) // mesh.sequence


def text_bytes(config: dict[str, Any], itemsize: int, mesh: Mesh) -> int:
    """Return the bytes of the text K/V cache for a guided sample on one rank.

    Holds keys and values of all layers and heads, of both texts unless another rank makes the other half of guidance.
    """
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    texts = 2 // mesh.guidance
    return texts * 2 * int(config["num_layers"]) * MAX_TOKENS * width * itemsize
