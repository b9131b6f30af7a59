from __future__ import annotations

import pytest
import torch
from safetensors.torch import load

from benchmarks.model.parity import CASES, relative_error
from serve_app.request import Params
from serve_app.wan.generate import Generator
from serve_app.wan.sampling.sample import Sample
from serve_app.wan.sampling.sampler import NotFinite, advance, denoise
from serve_app.wan.sampling.snapshot import to_bytes

BASE = next(iter(CASES.values()))
FUSE = 8192
# Samples of one shape that differ in prompts, lengths, seeds, scales and schedules.
UNLIKE = [
    BASE,
    Params(**{**BASE.model_dump(), "prompt": "蓝色的星星", "seed": 5, "guidance_scale": 6.5, "guidance_scale_2": 1.5}),
    Params(**{**BASE.model_dump(), "seed": 6, "num_inference_steps": 11, "flow_shift": 9.0, "negative_prompt": "x"}),
]


def test_samples_in_a_batch_are_as_alone(generator: Generator) -> None:
    samples = [generator.start(params) for params in UNLIKE]
    advance(generator.experts["transformer"], samples[:1], FUSE)  # joined later by the others
    shared = 0
    while waiting := [sample for sample in samples if not sample.finished]:
        batch = [sample for sample in waiting if sample.cohort == waiting[-1].cohort]
        shared += len(batch) > 1 and len({sample.timestep for sample in batch}) > 1
        advance(generator.experts[batch[0].expert], batch, FUSE)
    assert shared > 3
    for sample in samples:
        assert relative_error(sample.latents, generator.latents(sample.params)) <= 1e-5


@pytest.mark.parametrize("params", UNLIKE[:2])
def test_fused_guidance_changes_nothing(generator: Generator, params: Params) -> None:
    fused = denoise(generator.experts, generator.start(params), fuse_guidance_tokens=FUSE)
    apart = denoise(generator.experts, generator.start(params), fuse_guidance_tokens=0)
    assert relative_error(fused, apart) <= 1e-5


def test_forward_passes(generator: Generator) -> None:
    sizes = []
    model = generator.experts["transformer"]
    with model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]))):
        guided = generator.start(BASE)
        for fuse in (2 * guided.tokens, 2 * guided.tokens - 1):
            advance(model, [generator.start(BASE)], fuse)
        advance(model, [generator.start(BASE), generator.start(UNLIKE[1])], 4 * guided.tokens)
        advance(model, [generator.start(Params(**{**BASE.model_dump(), "guidance_scale": 1.0}))], 0)
    assert sizes == [2, 1, 1, 4, 1]


def test_only_samples_of_one_cohort(generator: Generator) -> None:
    other = generator.start(Params(**{**BASE.model_dump(), "width": 80}))
    with pytest.raises(ValueError, match="samples of one cohort expected"):
        advance(generator.experts["transformer"], [generator.start(BASE), other], FUSE)
    with pytest.raises(ValueError, match="samples of one cohort expected"):
        advance(generator.experts["transformer"], [], FUSE)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_named(generator: Generator, poison: float) -> None:
    good, bad = generator.start(BASE), generator.start(UNLIKE[1])
    bad.name = "job-7"
    bad.latents[0, 0, 0, 0, 0] = poison
    with pytest.raises(NotFinite, match="denoise stage's step 1 of 8: sample job-7 with seed 5") as error:
        advance(generator.experts["transformer"], [good, bad], FUSE)
    assert error.value.samples == [bad]
    assert not error.value.retryable
    alone = generator.start(BASE)
    advance(generator.experts["transformer"], [alone], FUSE)
    assert relative_error(good.latents, alone.latents) <= 1e-5


def test_progress_of_the_whole_loop(generator: Generator) -> None:
    seen: list[tuple[int, int]] = []
    sample = generator.start(BASE)

    def note(at: Sample) -> None:
        seen.append((at.step, at.steps))

    latents = denoise(generator.experts, sample, note)
    assert seen == [(step, 8) for step in range(1, 9)]
    assert latents is sample.latents
    assert latents.dtype == torch.float32


def test_a_step_that_raises_halfway_changes_no_sample(generator: Generator) -> None:
    first, second = generator.start(BASE), generator.start(UNLIKE[1])
    model = generator.experts["transformer"]
    advance(model, [first, second], FUSE)
    revision = generator.checkpoint.revision
    before = [to_bytes(sample, revision) for sample in (first, second)]
    healthy = second.scheduler.step

    def breaks(*args: object, **options: object) -> None:
        raise RuntimeError("no memory for this one")

    second.scheduler.step = breaks
    with pytest.raises(RuntimeError, match="no memory"):
        advance(model, [first, second], FUSE)
    second.scheduler.step = healthy
    assert [tensors(data) for data in before] == [tensors(to_bytes(s, revision)) for s in (first, second)]
    advance(model, [first, second], FUSE)
    alone = generator.start(BASE)
    for _ in range(2):
        advance(model, [alone], FUSE)
    assert relative_error(first.latents, alone.latents) <= 1e-5


def test_a_snapshot_is_not_changed_by_later_steps(generator: Generator) -> None:
    sample = generator.start(BASE)
    for _ in range(3):
        advance(generator.experts[sample.expert], [sample], FUSE)
    frozen, now = sample.snapshot(), to_bytes(sample, "r")
    for _ in range(3):
        advance(generator.experts[sample.expert], [sample], FUSE)
    assert tensors(to_bytes(frozen, "r")) == tensors(now) != tensors(to_bytes(sample, "r"))
    sample.to(torch.device("cpu"))
    assert sample.state_bytes == sum(len(raw) for raw in tensors(to_bytes(sample, "r")).values()) + sum(
        text.nbytes - len(tensors(to_bytes(sample, "r"))[name])
        for name, text in (("positive", sample.positive), ("negative", sample.negative))
    )


def tensors(data: bytes) -> dict[str, bytes]:
    """The tensors of a state. Its metadata comes in any order."""
    return {name: tensor.numpy().tobytes() for name, tensor in load(data).items()}
