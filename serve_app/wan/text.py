"""Text encoding: prompts to embeddings equal to those of `diffusers.WanPipeline`.

Knows nothing of denoising; an `Embedding` is plain data that can be cached and sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import UMT5EncoderModel
from transformers.utils import logging

from serve_app.prompt import clean_prompt
from serve_app.wan.weights.checkpoint import MAX_TOKENS, Checkpoint
from serve_app.wan.weights.files import check_loading
from serve_app.wan.weights.random_weights import randomise
from serve_app.wan.weights.tensors import TextConfig
from serve_app.wan.weights.tokenizer import Tokenizer


@dataclass(frozen=True)
class Embedding:
    """An encoded prompt.

    Attributes:
        tensor: `[tokens, dim]` on the CPU, without padding.
        tokens: number of valid tokens, at most `MAX_TOKENS`.
        truncated: true if the prompt had more tokens.
    """

    tensor: torch.Tensor
    tokens: int
    truncated: bool


def pad(embedding: Embedding) -> torch.Tensor:
    """Return the embedding in the shape that experts read: `[512, dim]`, zeros after the last token."""
    tensor = embedding.tensor
    return torch.cat([tensor, tensor.new_zeros(MAX_TOKENS - tensor.shape[0], tensor.shape[1])])


class TextEncoder:
    """The UMT5 encoder of a checkpoint and its tokenizer.

    Args:
        checkpoint: holds encoder and tokenizer.
        device: device to run on.
        dtype: dtype of the weights; modules that transformers keeps in float32 stay so.

    Raises:
        CheckpointError: tokenizer or weights are not what the configuration asks for.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # a bar of each replica would fill the cluster's logs
        try:
            self.tokenizer = Tokenizer(checkpoint.folder / "tokenizer")
            self.model, loading = UMT5EncoderModel.from_pretrained(
                checkpoint.folder / "text_encoder", dtype=dtype, use_safetensors=True, output_loading_info=True
            )
        finally:
            if bars:
                logging.enable_progress_bar()
        check_loading(checkpoint.folder / "text_encoder", loading, TextConfig.is_ignored)
        self.model.eval().requires_grad_(False).to(device)
        if checkpoint.random:
            randomise(self.model)
        self.device = device

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Embedding]:
        """Encode prompts in one forward pass.

        Every prompt is padded to 512 tokens before the encoder, as in WanPipeline, so that its embedding does not
        depend on the rest of the batch.
        """
        texts = [clean_prompt(prompt) for prompt in prompts]
        whole = [self.tokenizer.ids(text) for text in texts]
        rows = [self.tokenizer.cut(ids) for ids in whole]
        inputs = torch.tensor([[*ids, *[self.tokenizer.pad_id] * (MAX_TOKENS - len(ids))] for ids in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (MAX_TOKENS - len(ids)) for ids in rows])
        states = self.model(inputs.to(self.device), mask.to(self.device)).last_hidden_state.cpu()
        # Cloned, because a view would keep, and send, the whole padded batch.
        return [
            Embedding(states[row, : len(ids)].clone(), len(ids), len(whole[row]) > len(ids))
            for row, ids in enumerate(rows)
        ]
