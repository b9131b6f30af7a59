"""Captions, the held-out split, the tokenizer, and the shortened cross-attention of the recipe."""

import hashlib
import random

import pytest
import torch
from diffusers import WanTransformer3DModel
from transformers import AutoTokenizer

from serve_app.tiny import CHECKPOINT, words
from serve_app.tiny.recipe import captions, text
from serve_app.tiny.recipe.dataset import describe, scenes_for_training
from serve_app.tiny.recipe.shapes import paths, random_scenes


def test_training_never_shows_held_out_objects() -> None:
    scenes = scenes_for_training(3000, torch.Generator().manual_seed(0))
    held = captions.held_out()
    first = held[scenes.colour[:, 0], scenes.shape[:, 0], scenes.motion[:, 0]]
    second = held[scenes.colour[:, 1], scenes.shape[:, 1], scenes.motion[:, 1]] & (scenes.count == 2)
    assert not first.any()
    assert not second.any()


@pytest.mark.parametrize("language", captions.LANGUAGES)
def test_benchmark_phrasings_are_unseen(language: str) -> None:
    patterns = words.PATTERN[language]
    assert not set(patterns["train"]) & set(patterns["test"])
    held = {captions.names(*t) for t in captions.held_out().nonzero().tolist()}
    prompts = captions.held_out_prompts(200, language)
    assert all(thing in held for p in prompts for thing in p.things)
    seen = set(describe(scenes_for_training(500, torch.Generator().manual_seed(1)), 4, random.Random(0))[0])
    assert not seen & {p.text for p in prompts}


@pytest.mark.parametrize(("language", "digest"), [("en", "1efd1cdf622b906c"), ("zh", "783b1106c732d434")])
def test_benchmark_prompts_never_change(language: str, digest: str) -> None:
    texts = "\n".join(p.text for p in captions.held_out_prompts(200, language))
    assert hashlib.sha256(texts.encode()).hexdigest().startswith(digest)


def test_one_zero_slot_stands_for_all() -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=24, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2
    ).eval()
    told = torch.randn(2, text.LENGTH, 32)
    told[1, 9:] = 0
    x, t = torch.randn(2, 16, 3, 4, 6), torch.tensor([900.0, 300.0])
    with torch.no_grad():
        full = model(x, t, torch.cat([told, torch.zeros(2, text.SLOTS - text.LENGTH, 32)], 1)).sample
        for block in model.blocks:
            block.attn2.set_processor(text.ShortCrossAttention())
        short = model(x, t, torch.cat([told, torch.zeros(2, 1, 32)], 1)).sample
    assert torch.allclose(full, short, atol=2e-5)


@pytest.mark.parametrize("language", captions.LANGUAGES)
def test_asides_are_not_the_benchmarks(language: str) -> None:
    tables = (words.PATTERN, words.GROUND_PHRASE)
    held = [p for table in tables for p in table[language]["test"]]
    if language == "zh":
        held += words.PAIR_ZH["test"]
    assert [a for a in words.ASIDES[language] if any(a in h for h in held)] == []


def test_asides_leave_the_caption_alone() -> None:
    rng = random.Random(0)
    thing = captions.names(0, 1, 0)
    texts = [captions.caption([thing], "black", "zh", "train", rng) for _ in range(600)]
    share = sum(any(a in t for a in words.ASIDES["zh"]) for t in texts) / len(texts)
    assert abs(share - captions.ASIDE_SHARE) < 0.08
    assert all("红" in t and any(s in t for s in words.SHAPE_WORDS["zh"]["square"]) for t in texts)


def test_pairs_are_told_in_the_order_of_their_places() -> None:
    scenes = random_scenes(400, torch.Generator().manual_seed(3), two=1.0)
    centre = paths(scenes, 9, 96, 96)[0].mean(2)  # [N, 2, 2]
    apart = torch.where(
        scenes.vertical_split == 1, centre[:, 1, 0] - centre[:, 0, 0], centre[:, 1, 1] - centre[:, 0, 1]
    )
    assert (apart > 0).all()
    told = describe(scenes, 4, random.Random(0))[1]
    assert (told[:, :, 0] == scenes.colour[:, :1] + 1).all()
    assert (told[:, :, 3] == scenes.colour[:, 1:] + 1).all()


def test_shares_of_pairs() -> None:
    scenes = random_scenes(4000, torch.Generator().manual_seed(5), two=0.6, forbidden=captions.held_out(), alike=0.3)
    pair = scenes.count == 2
    assert abs(pair.float().mean() - 0.6) < 0.04
    same = (
        torch.stack([scenes.shape, scenes.colour, scenes.motion], -1)
        .eq(torch.stack([scenes.shape, scenes.colour, scenes.motion], -1).flip(1))[:, 0]
        .all(-1)
    )
    assert abs(same[pair].float().mean() - 0.3) < 0.04


def test_ids_are_those_of_the_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    texts = [*describe(scenes_for_training(200, torch.Generator().manual_seed(2)), 2, random.Random(0))[0], "a " * 90]
    wanted = tokenizer(texts, padding="max_length", max_length=text.LENGTH, truncation=True, return_tensors="pt")
    ids = text.token_ids(tokenizer, texts)
    assert torch.equal(ids.long(), wanted.input_ids)
    assert int((ids > 0).sum(1)[:-1].max()) < text.LENGTH


def test_reader_ignores_what_is_not_asked() -> None:
    torch.manual_seed(0)
    reader = text.Reader(16)
    embeddings, ids = torch.randn(4, text.LENGTH + 1, 16), torch.ones(4, text.LENGTH, dtype=torch.int16)
    told = torch.tensor([[1, 2, 3, 0, 0, 0, 1, 1]]).repeat(4, 1)
    half = told.clone()
    half[2:] = -1
    assert torch.allclose(reader(embeddings, ids, half)[0], reader(embeddings[:2], ids[:2], told[:2])[0])
    loss, right = reader(embeddings, ids, torch.full_like(told, -1))
    assert loss.detach().item() == 0
    assert right.item() == 0
