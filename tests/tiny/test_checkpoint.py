"""The shipped checkpoint: size, layout, tokenizer, and a clip from plain WanPipeline."""

import warnings

import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer

from serve_app.tiny import CHECKPOINT
from serve_app.tiny.recipe.captions import DEFAULTS

pytestmark = pytest.mark.skipif(not (CHECKPOINT / "model_index.json").exists(), reason="no trained checkpoint yet")


def test_folder_is_small() -> None:
    assert sum(p.stat().st_size for p in CHECKPOINT.rglob("*") if p.is_file()) <= 16 * 2**20


@pytest.mark.parametrize(
    "text", ["a red circle moving left on a white background", "黑色背景，两个黄色的星星向上移动", "🎬 ¿qué? ﷺ \x07 𠮷"]
)
def test_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == normal


def test_words_are_single_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    assert len(tokenizer("a red circle").input_ids) == 4
    assert len(tokenizer("红色圆形").input_ids) == 5


def test_pipeline_draws_a_finite_clip() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # diffusers announces the end of this argument's name; everything else must be silent.
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        pipe = WanPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for expert in (pipe.transformer, pipe.transformer_2):
        assert expert.config.num_attention_heads % 4 == 0
        assert expert.dtype == torch.float32
    assert pipe.config.boundary_ratio == 0.875
    assert pipe.scheduler.config.flow_shift == DEFAULTS["flow_shift"]
    clip = pipe(
        "a red circle moving left",
        height=64,
        width=80,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames
    assert clip.shape == (1, 9, 64, 80, 3)
    assert clip.min() >= 0
    assert clip.max() <= 1
    assert clip.std() > 0.01
