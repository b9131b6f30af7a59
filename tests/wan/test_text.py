from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from serve_app.wan.generate import Generator
from serve_app.wan.text import TextEncoder, clean_prompt, pad
from serve_app.wan.weights.checkpoint import MAX_TOKENS


@pytest.fixture(scope="module")
def encoder(generator: Generator) -> TextEncoder:
    return generator.text


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a   red\n\tcircle ", "a red circle"),
        ("Tom &amp;amp; Jerry &lt;3", "Tom & Jerry <3"),
        ("donâ€™t", "don't"),  # UTF-8 read as Windows-1252, and the curly quote made straight
        ("schÃ¶n", "schön"),
        ("红色的圆形，向左移动。", "红色的圆形,向左移动。"),  # ftfy makes full-width Latin punctuation plain
        ("ＡＢＣ　１２", "ABC 12"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean_prompt(text) == cleaned
    assert prompt_clean(text) == cleaned


@pytest.mark.parametrize("prompt", ["a red circle moves left", "蓝色的星星", "", "x " * 300, "zu viel " * 100])
def test_equal_to_wan_pipeline(encoder: TextEncoder, pipeline: WanPipeline, prompt: str) -> None:
    with torch.no_grad():  # as its __call__ does
        expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS)
    embedding = encoder.encode([prompt])[0]
    assert torch.equal(pad(embedding)[None], expected)
    assert embedding.tensor.shape == (embedding.tokens, 64)


def test_padding_is_zero(encoder: TextEncoder) -> None:
    embedding = encoder.encode(["a red circle"])[0]
    padded = pad(embedding)
    assert padded.shape == (MAX_TOKENS, 64)
    assert 1 < embedding.tokens < 20
    assert not padded[embedding.tokens :].any()
    assert padded[: embedding.tokens].abs().sum(dim=1).min() > 0


@pytest.mark.parametrize(("characters", "truncated"), [(510, False), (511, True), (4000, True)])
def test_512_tokens(encoder: TextEncoder, characters: int, truncated: bool) -> None:
    # The tokenizer makes one token of each character, one of the leading space, and one of the end.
    embedding = encoder.encode(["圆" * characters])[0]
    assert embedding.truncated is truncated
    assert embedding.tokens == min(characters + 2, MAX_TOKENS)


def test_a_batch_is_as_alone(encoder: TextEncoder) -> None:
    prompts = ["a red circle", "绿色的方块", "y " * 400]
    for together, prompt in zip(encoder.encode(prompts), prompts, strict=True):
        alone = encoder.encode([prompt])[0]
        assert (together.tokens, together.truncated) == (alone.tokens, alone.truncated)
        torch.testing.assert_close(together.tensor, alone.tensor, rtol=1e-4, atol=1e-5)


def test_prompts_differ(encoder: TextEncoder) -> None:
    red, blue = encoder.encode(["a red circle", "a blu circle"])
    assert not torch.allclose(red.tensor, blue.tensor, rtol=1e-2, atol=1e-2)
