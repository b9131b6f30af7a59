"""What denoising costs, from the shape of the model alone: floating-point operations and bytes.

Knows neither devices nor what was measured on them. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from serve_app.request import Params
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.weights.checkpoint import MAX_TOKENS


def latent_tokens(config: dict[str, Any], latent_shape: Sequence[int]) -> int:
    """Tokens of one sample after patching.

    Args:
        config: of an expert.
        latent_shape: frames, height and width.
    """
    return math.prod(side // patch for side, patch in zip(latent_shape, config["patch_size"], strict=True))


def video_tflop(config: dict[str, Any], params: Params) -> float:
    """TFLOP, 10^12 floating-point operations, of all denoising steps of a video, with both halves of its guidance.

    Both experts of a checkpoint are taken to be of one shape. The text encoder, whose part is the same for every video,
    and the VAE are left out.

    Args:
        config: of an expert.
    """
    tokens = latent_tokens(config, params.latent_shape)
    return params.num_inference_steps * step_flops(config, tokens, params.guided) / 1e12


def step_flops(config: dict[str, Any], tokens: int, guided: bool) -> float:
    """Floating-point operations of one denoising step of one sample, on all ranks together.

    Counts matrix products and attention, a multiplication and an addition as two; all else is a few per cent. The keys
    and values of the text are left out: they are made once for many steps (see `TextCache`).

    Args:
        config: of an expert.
        tokens: latent tokens after patching.
    """
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    ffn, layers = int(config["ffn_dim"]), int(config["num_layers"])
    projections = 2 * tokens * (6 * width**2 + 2 * width * ffn)
    attention = 4 * tokens * (tokens + MAX_TOKENS) * width
    return float(layers * (projections + attention)) * (2 if guided else 1)


def activation_bytes(config: dict[str, Any], tokens: int, itemsize: int, mesh: Mesh, compiled: bool = False) -> int:
    """Working memory of a forward pass over `tokens` on one rank, beside the weights and the texts' keys and values.

    The widest moment of a block: the feed-forward's hidden features, this rank's share of them, beside six tensors of
    the model's width. Norms, modulation and RoPE compute in float32, whatever the model does: compiled, they keep none
    of it; else their steps are tensors of their own, which for a half-precision model are three more of its width.
    """
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    wide = 6 if compiled or itemsize >= 4 else 9
    return tokens * itemsize * (int(config["ffn_dim"]) // mesh.tensor + wide * width) // mesh.sequence


def text_bytes(config: dict[str, Any], itemsize: int, mesh: Mesh) -> int:
    """What an expert keeps on one rank for the texts of a guided sample: keys and values of all layers and heads,
    and of both texts unless another rank makes the other half of guidance.
    """
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    texts = 2 // mesh.guidance
    return texts * 2 * int(config["num_layers"]) * MAX_TOKENS * width * itemsize
