"""The tiny model's tokenizer, and text encoding for training, equal to that of WanPipeline.

WanPipeline pads every prompt to 512 tokens and zeroes the padding's embeddings, but leaves the 512 slots in the
cross-attention. In training one zero slot stands for all of them: its logit is raised by log(number of slots), which
gives the same softmax (tests/tiny/test_text.py) at an eighth of the keys.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

SLOTS = 512  # what WanPipeline pads to
LENGTH = 63  # tokens kept in training, the end token included; with the zero slot that makes 64
VOCABULARY = 1400
TEXT_CONFIG: dict[str, Any] = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_heads": 4,
    "num_layers": 3,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": True,
}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, to which no text is unknown.

    Han characters are split apart, so that a token never spans a phrase.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A leading space makes the first word of a prompt the token it is elsewhere.
    tokenizer.train_from_iterator([" " + text for text in texts], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=SLOTS,
        clean_up_tokenization_spaces=False,
    )


def new_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Return an untrained text encoder for so many tokens."""
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **TEXT_CONFIG))
    nn.init.normal_(encoder.shared.weight, std=1.0)
    return encoder


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Return the tokens of texts as int16 [n, LENGTH]; 0 is padding.

    They come from the backend, which uses all cores: a padded batch of transformers takes three times as long.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(LENGTH)
    out = np.zeros((len(texts), LENGTH), np.int16)
    for row, encoding in zip(out, backend.encode_batch_fast(texts), strict=True):
        ids = encoding.ids
        row[: len(ids)] = ids
    return torch.from_numpy(out)


def embed(encoder: UMT5EncoderModel, ids: Tensor) -> Tensor:
    """Encode tokens [n, LENGTH] to embeddings [n, LENGTH + 1, d], with zeroed padding and the zero slot last."""
    mask = ids > 0
    hidden = encoder(ids.long(), mask.long()).last_hidden_state
    return F.pad(hidden * mask[..., None].to(hidden.dtype), (0, 0, 0, 1))


class ShortCrossAttention:
    """Cross-attention whose last key stands for the remaining SLOTS - LENGTH zero slots.

    The logit bias travels in spare dimensions of query and key, so that the fused attention kernels stay usable; it
    is split in two terms because bfloat16 alone rounds log(449) by one per cent of its weight.
    """

    _parallel_config = None
    _attention_backend = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the attention of `hidden_states` to the text."""
        heads = attn.heads
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (heads, -1)).transpose(1, 2)
        k = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (heads, -1)).transpose(1, 2)
        v = attn.to_v(encoder_hidden_states).unflatten(2, (heads, -1)).transpose(1, 2)
        d = q.shape[-1]
        bias = math.log(SLOTS - LENGTH) * math.sqrt(d)
        coarse = float(int(bias))
        extra = torch.zeros(k.shape[2], 8, device=k.device)
        extra[-1, 0], extra[-1, 1] = coarse, bias - coarse
        one = torch.zeros(8, device=q.device)
        one[:2] = 1
        k = torch.cat([k.type_as(v), extra.to(v.dtype).expand(*k.shape[:2], -1, -1)], -1)
        q = torch.cat([q.type_as(v), one.to(v.dtype).expand(*q.shape[:3], -1)], -1)
        out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), scale=1 / math.sqrt(d))[..., :d]
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[0](out)


class Reader(nn.Module):
    """Auxiliary heads for training, which read from the embeddings what a caption tells.

    Eight questions (colour, shape, motion of the first and second object; background; count) attend to the tokens;
    class 0 means "not told". This teaches the encoder the words in seconds, long before denoising would.
    """

    CLASSES = (9, 5, 8, 9, 5, 8, 6, 3)
    spare: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        n = len(self.CLASSES)
        self.query = nn.Parameter(torch.randn(n, width) / width**0.5)
        self.key = nn.Linear(width, width)
        self.heads = nn.Parameter((torch.rand(n, width, max(self.CLASSES)) * 2 - 1) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(n, max(self.CLASSES)))
        spare = torch.arange(max(self.CLASSES)) >= torch.tensor(self.CLASSES)[:, None]
        self.register_buffer("spare", spare, persistent=False)

    def forward(self, embeddings: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the share of right answers.

        All questions are computed at once and without indexing by a mask, which would make the host wait for the
        device.

        Args:
            embeddings: [n, LENGTH + 1, d].
            ids: tokens, [n, LENGTH].
            targets: the right classes, [n, 8]; -1 is ignored.
        """
        tokens = embeddings[:, :-1]
        logits = torch.einsum("qd,ntd->nqt", self.query, self.key(tokens)).masked_fill((ids == 0)[:, None], -1e4)
        answers = logits.softmax(-1) @ tokens
        out = torch.einsum("nqd,qdc->nqc", answers, self.heads).float() + self.bias
        out = out.masked_fill(self.spare, -1e4).flatten(0, 1)
        told = targets.flatten()
        known = (told >= 0).float()
        total = known.sum().clamp(min=1)
        loss = F.cross_entropy(out, told, ignore_index=-1, reduction="sum") / total
        return loss, ((out.argmax(-1) == told) * known).sum() / total
