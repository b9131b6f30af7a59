"""A model folder of A14B's exact configuration whose weight files are holes: real names, shapes and sizes, no bytes.

    python -m benchmarks.model.dummy_checkpoint FOLDER [--layers 40]

The files are sparse: they take next to no disk, and read as zeros. With `model.weights: random` the values are drawn.
Configurations as published with Wan2.2-T2V-A14B; the tokenizer is that of the tiny model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from serve_app.tiny import CHECKPOINT
from serve_app.wan.weights.reader import header

A14B: dict[str, Any] = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
XXL: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}


def write(
    folder: Path,
    expert: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
) -> Path:
    """Write the folder; what is given changes A14B's configuration of experts, text encoder and VAE.

    Returns:
        The `folder`.
    """
    folder.mkdir(parents=True)
    shape = A14B | (expert or {})
    with torch.device("meta"):
        experts = WanTransformer3DModel(**shape)
        # The experts read what it writes, or the folder would be refused.
        encoder = UMT5EncoderModel(UMT5Config(**(XXL | {"d_model": shape["text_dim"]} | (text or {}))))
        decoder = AutoencoderKLWan(**(vae or {}))
    for name in ("transformer", "transformer_2"):
        experts.save_config(folder / name)
        hole(folder / name / "diffusion_pytorch_model.safetensors", experts, torch.float32)
    encoder.config.architectures = ["UMT5EncoderModel"]
    encoder.config.save_pretrained(folder / "text_encoder")
    hole(folder / "text_encoder" / "model.safetensors", encoder, torch.bfloat16)
    decoder.save_config(folder / "vae")
    hole(folder / "vae" / "diffusion_pytorch_model.safetensors", decoder, torch.float32)
    # The published conversion says 3 here; a request brings its own.
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    shutil.copytree(CHECKPOINT / "tokenizer", folder / "tokenizer")
    index = json.loads((CHECKPOINT / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.875}, indent=2))
    return folder


def hole(file: Path, model: nn.Module, dtype: torch.dtype) -> None:
    """Write a safetensors file of a model's parameters, of full length, with a hole behind its header."""
    parameters = dict(model.named_parameters())
    beginning = header({name: (dtype, parameter.shape) for name, parameter in parameters.items()})
    with file.open("wb") as stream:
        stream.write(beginning)
        stream.truncate(len(beginning) + sum(parameter.numel() for parameter in parameters.values()) * dtype.itemsize)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=A14B["num_layers"])
    options = parser.parse_args()
    write(options.folder, {"num_layers": options.layers})
    print(options.folder)


if __name__ == "__main__":
    main()
