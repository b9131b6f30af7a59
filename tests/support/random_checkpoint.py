"""A tiny random Wan2.2 folder of the real layout: the same classes and files as A14B, seeded, made in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

HEADS = 8


def write(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Write a checkpoint into `folder`; its videos are noise, but depend on every input.

    Args:
        folder: made here, with its parents.
        seed: of the weights.
        layers: layers of each expert.

    Returns:
        The `folder`.
    """
    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
            )
        )
        experts = [_expert(layers) for _ in range(2)]
        vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=experts[0],
        transformer_2=experts[1],
        boundary_ratio=0.875,
    ).save_pretrained(folder)
    return Path(folder)


def _expert(layers: int) -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=24,
        text_dim=64,
        freq_dim=64,
        ffn_dim=384,
        num_layers=layers,
        rope_max_seq_len=128,
    ).eval()
    for name, parameter in model.named_parameters():
        # Fresh norms are ones and fresh biases nearly zero: a shard with the wrong slice of either would go unnoticed.
        if name.endswith(("norm_q.weight", "norm_k.weight", "bias")):
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif "attn2" in name:  # lets the prompt through, which a fresh model all but ignores
            parameter.data *= 3
    return model


def _tokenizer() -> T5Tokenizer:
    """Make a tokenizer of printable ASCII and the 3,755 most frequent Chinese characters, one token each."""
    hanzi = [
        bytes([row, column]).decode("gb2312", "ignore") for row in range(0xB0, 0xD8) for column in range(0xA1, 0xFF)
    ]
    characters = [*map(chr, range(33, 127)), *"，。、！？：；“”（）", *filter(None, hanzi)]
    shard_slices = ["<pad>", "</s>", "<unk>", "▁", *characters]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in shard_slices], extra_ids=0, model_max_length=512)
