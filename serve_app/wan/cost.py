"""The cost of a video, from the shape of the model alone: floating-point operations and bytes.

Knows neither devices nor measurements. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from serve_app.request import Params
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.weights.checkpoint import MAX_TOKENS
from serve_app.wan.weights.tensors import TextConfig, VaeConfig

_EAGER, _EAGER_SHARED, _EAGER_FLOAT32 = 5.8, 7.0, 3.8
"""Tensors of the model's width that blocks keep more of where they are not compiled: in half precision, in half
precision where the norms span the ranks of tensor parallelism, and in float32."""


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
    width = _width(config)
    ffn, layers = int(config["ffn_dim"]), int(config["num_layers"])
    projections = 2 * tokens * (6 * width**2 + 2 * width * ffn)
    attention = 4 * tokens * (tokens + MAX_TOKENS) * width
    return float(layers * (projections + attention)) * (2 if guided else 1)


def activation_bytes(config: dict[str, Any], tokens: int, itemsize: int, mesh: Mesh, compiled: bool = False) -> int:
    """Return the bytes that a forward pass needs on one rank, beside the weights and the texts' keys and values.

    Counted in tensors of the model's width for all tokens. Alive at once in a compiled block are the hidden states,
    query, key and value, and what attention and the layer after it make of them: six. In the feed-forward they are
    three beside its hidden features. Ranks divide all of that. What they exchange comes on top: with sequence
    parallelism, copies of query, key and value; with tensor parallelism, the gathered tokens, and sums for the other
    ranks' tokens. Norms, modulation and rotation compute in float32, which blocks that are not compiled keep, for the
    rank's own tokens: for a half-precision model that is as much again.

    `tests/planning/test_memory.py` compares the results with the peaks that were measured.
    """
    width, ffn = _width(config), int(config["ffn_dim"])
    share = 1 / (mesh.tensor * mesh.sequence)
    attention, feed_forward = 6 * share, (3 + ffn / width) * share
    if mesh.sequence > 1:
        attention += 3 * share
    if mesh.tensor > 1:
        attention += 2.35 / mesh.sequence - 1.5 * share
        feed_forward += 1 / mesh.sequence
    most = max(attention, feed_forward)
    if not compiled and itemsize < 4:
        most += (_EAGER if mesh.tensor == 1 else _EAGER_SHARED) * share
    elif not compiled:
        most += _EAGER_FLOAT32 * share
    # Outside of blocks: the latents as patches and what is predicted, the rotation in float32, the text as projected.
    patches = math.prod(config.get("patch_size", (1, 2, 2))) * int(config.get("in_channels", 16)) * itemsize
    rotation = 2 * int(config["attention_head_dim"]) * 4
    return int(tokens * (itemsize * width * most + patches + rotation) + 2 * MAX_TOKENS * width * itemsize)


def work_bytes(config: dict[str, Any], tokens: int, itemsize: int, mesh: Mesh, compiled: bool = False) -> int:
    """Return all bytes that a forward pass takes on one rank of GPUs, beside the weights and the texts."""
    step = activation_bytes(config, tokens, itemsize, mesh, compiled)
    return step + slack_bytes(config, tokens, itemsize, mesh) + symmetric_bytes(config, tokens, itemsize, mesh)


def slack_bytes(config: dict[str, Any], tokens: int, itemsize: int, mesh: Mesh) -> int:
    """Return the bytes that a GPU's allocator holds beyond the peak of its tensors: parts too small for what comes.

    Two fifths of a compiled pass, by benchmarks/results/2026-11-25-a14b-2xh100.md and 2026-11-26-a14b-2xh200.md.
    """
    return int(0.4 * activation_bytes(config, tokens, itemsize, mesh, compiled=True))


def symmetric_bytes(config: dict[str, Any], tokens: int, itemsize: int, mesh: Mesh) -> int:
    """Return the bytes of the memory through which a rank's tensor-parallel neighbours exchange results by copies.

    Two places, for the tokens of each other rank and for its part of a sum. No allocator counts them.
    """
    run = -(-tokens // (mesh.sequence * mesh.tensor))
    return 2 * (mesh.tensor - 1) * run * _width(config) * itemsize


def text_bytes(config: dict[str, Any], itemsize: int, mesh: Mesh) -> int:
    """Return the bytes of the text K/V cache for a guided sample on one rank.

    Holds keys and values of all layers and heads, of both texts unless another rank makes the other half of guidance.
    """
    width = _width(config)
    texts = 2 // mesh.guidance
    return texts * 2 * int(config["num_layers"]) * MAX_TOKENS * width * itemsize


def encode_flops(config: TextConfig, texts: int = 2) -> float:
    """Return the floating-point operations of encoding some texts, each padded to `MAX_TOKENS`.

    Args:
        config: the text encoder's.
        texts: number of texts; a guided sample has two.
    """
    weights = sum(math.prod(shape) for name, shape in config.tensors().items() if name != "shared.weight")
    attention = 4 * config.num_layers * MAX_TOKENS * config.num_heads * config.d_kv
    return float(texts * MAX_TOKENS * (2 * weights + attention))


def decode_flops(config: VaeConfig, latent_shape: Sequence[int]) -> float:
    """Return the floating-point operations of decoding one sample: the decoder's convolutions, and its attention.

    Args:
        config: the VAE's.
        latent_shape: frames, height and width.
    """
    frames, height, width = latent_shape
    level, work = 0, 0.0
    doubled = [*reversed(config.temperal_downsample), False]
    for name, shape in config.tensors().items():
        if not name.startswith("decoder.") or len(shape) < 4:
            continue
        up = name.startswith("decoder.up_blocks.")
        level = int(name.split(".")[2]) if up else len(doubled) - 1 if name.startswith("decoder.conv_out") else 0
        # The first frame stays alone, whatever is doubled.
        made = _doubled(frames, sum(doubled[:level]))
        pixels = height * width * 4**level
        if "upsamplers" in name:
            made, pixels = (made, pixels) if "time_conv" in name else (_doubled(made, doubled[level]), 4 * pixels)
        work += 2 * math.prod(shape) * made * pixels
    middle = (config.decoder_base_dim or config.base_dim) * config.dim_mult[-1]
    return work + 4.0 * frames * (height * width) ** 2 * middle


def _doubled(frames: int, times: int) -> int:
    return 1 + (frames - 1) * 2**times


def _width(config: dict[str, Any]) -> int:
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])
