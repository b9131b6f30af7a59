"""A text's keys and values are made once for a batch, and a step with them is the step without."""

from __future__ import annotations

import pytest
import torch

from serve_app.request import Params
from serve_app.wan.generate import Generator
from serve_app.wan.sampling.sampler import advance
from serve_app.wan.transformer.text_cache import TextCache
from tests.wan.sampling.test_sampler import BASE

TEXTS = [torch.randn(1, 4, 2) for _ in range(3)]


def serve(memory: TextCache, texts: list[torch.Tensor]) -> bool:
    """One pass over a single layer; whether it found its keys and values."""
    with memory.serving(texts) as given:
        known = memory.get(0)
        assert given.shape[1] == (4 if known is None else 1)
        if known is None:
            memory.put(0, torch.stack([torch.cat(texts), torch.cat(texts)]))
        else:
            assert torch.equal(known[0], torch.cat(texts))
    assert memory.get(0) is None, "what is kept belongs to a pass"
    return known is not None


def test_the_same_batch_finds_them_and_any_other_does_not() -> None:
    memory = TextCache(1e9, fold=False)
    a, b, c = TEXTS
    assert [serve(memory, texts) for texts in ([a, b], [a, b], [b, a], [a], [a.clone()], [a, b])] == [
        False,
        True,
        False,
        False,
        False,
        False,
    ]
    assert not serve(memory, [c]) and serve(memory, [c])


def test_both_halves_of_guidance_are_kept_and_nothing_older() -> None:
    memory = TextCache(1e9, fold=False)
    a, b, c = TEXTS
    assert [serve(memory, [text]) for text in (a, b, a, b, c, b, a)] == [False, False, True, True, False, True, False]
    assert memory.bytes == 2 * 2 * a.nbytes


@pytest.mark.parametrize("limit", [0, TEXTS[0].nbytes])
def test_beyond_the_limit_nothing_is_kept(limit: int) -> None:
    memory = TextCache(limit, fold=False)
    assert not serve(memory, TEXTS[:1]) and not serve(memory, TEXTS[:1]) and memory.bytes == 0


def test_not_even_in_the_midst_of_a_pass_there_is_more_than_the_limit() -> None:
    a, b, c = TEXTS
    layer = 2 * a.nbytes
    memory = TextCache(3 * layer, fold=False)

    def put(text: torch.Tensor, layers: int) -> int:
        """Return the most bytes that there were during a pass over so many layers."""
        most = 0
        with memory.serving([text]) as given:
            for index in range(layers):
                memory.put(index, torch.stack([text, text]))
                assert memory._current is not None
                most = max(most, memory.bytes + memory._current.bytes)
            assert torch.equal(given, text)
        return most

    assert put(a, 2) == 2 * layer
    assert put(b, 4) == 3 * layer and memory.bytes == 0, "what is older goes first, then what does not fit"
    with memory.serving([b]) as given:
        assert torch.equal(given, b) and memory.get(0) is None
    assert put(c, 2) == 2 * layer and memory.bytes == 2 * layer
    with memory.serving([c]):
        assert memory.get(1) is not None


def test_a_pass_that_raises_leaves_nothing() -> None:
    memory = TextCache(1e9, fold=False)
    with pytest.raises(RuntimeError), memory.serving(TEXTS):
        memory.put(0, torch.stack([TEXTS[0], TEXTS[0]]))
        raise RuntimeError
    assert memory.bytes == 0 and not serve(memory, TEXTS)


@pytest.mark.parametrize(("lengths", "kept"), [((3, 7), 8), ((15, 2), 16), ((16, 16), 16), ((0,), 1)])
def test_one_token_stands_for_the_padding(lengths: tuple[int, ...], kept: int) -> None:
    texts = [torch.randn(1, 16, 8) for _ in lengths]
    for text, length in zip(texts, lengths, strict=True):
        text[:, length:] = 0
    query, project = torch.randn(len(texts), 1, 5, 8), torch.nn.Linear(8, 16)

    def attend(given: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        key, value = project(given)[:, None].chunk(2, dim=-1)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)

    memory = TextCache(1e9, fold=True)
    with memory.serving(texts) as given:
        assert given.shape[1] == kept
        torch.testing.assert_close(attend(given, memory.bias), attend(torch.cat(texts), None))
    assert memory.bias is None


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("fuse", [0, 8192])
@pytest.mark.parametrize("layers", [0, 1.5, 1e9])
def test_a_step_with_remembered_texts_is_the_step_without(
    generator: Generator, guidance: float, fuse: int, layers: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = generator.experts["transformer"]
    params = Params(**{**BASE.model_dump(), "guidance_scale": guidance})
    remembering, forgetting = generator.start(params), generator.start(params)
    # The cache's limit is that many layers' keys and values of one text.
    features = model.config.num_attention_heads * model.config.attention_head_dim
    with monkeypatch.context() as patch:
        patch.setattr(model.text_cache, "_limit", layers * 2 * 512 * features * 4)
        for _ in range(2):
            advance(model, [remembering], fuse)
    model.text_cache.clear()
    for _ in range(2):
        advance(model, [forgetting], fuse)
        model.text_cache.clear()
    assert torch.equal(remembering.latents, forgetting.latents)


def test_texts_are_not_worked_on_twice(generator: Generator) -> None:
    model = generator.experts["transformer"]
    model.text_cache.clear()
    sample, made = generator.start(BASE), []
    hook = model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: made.append(1))
    try:
        for _ in range(3):
            advance(model, [sample], 8192)
    finally:
        hook.remove()
    assert len(made) == 1
