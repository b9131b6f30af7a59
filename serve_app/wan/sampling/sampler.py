"""The denoising step: one forward pass for samples of one cohort, then one step of each sample's own scheduler.

Knows neither who chose the samples nor how the model is spread over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from serve_app.errors import JobFailed
from serve_app.wan.sampling.sample import Sample
from serve_app.wan.weights.checkpoint import Expert


class NotFinite(JobFailed):
    """Latents of `samples` became NaN or infinite. The other samples of the batch have made their step."""

    def __init__(self, samples: list[Sample]) -> None:
        super().__init__("not_finite", " ".join(self.message_for(sample) for sample in samples))
        self.samples = samples

    @staticmethod
    def message_for(sample: Sample) -> str:
        """Return the message for one sample only, since other samples of the batch are other users' videos."""
        return (
            "The latents are no longer finite numbers after the denoise stage's "
            f"step {sample.step} of {sample.steps}: sample {sample.name or '(unnamed)'} with seed {sample.params.seed}."
        )


@torch.no_grad()
def advance(model: torch.nn.Module, samples: list[Sample], fuse_guidance_tokens: int) -> None:
    """Do one denoising step of samples that share a cohort. They may be at different steps and guidance scales.

    All of them make their step, or none if anything but `NotFinite` is raised.

    Args:
        model: the expert that the samples' next step needs, as `load_expert` returns it.
        samples: at least one, all of equal `cohort`.
        fuse_guidance_tokens: the conditional and the unconditional prediction are one forward pass if it has at most so
            many tokens, both halves counted. Small models are faster that way, large ones only use more memory.

    Raises:
        ValueError: the samples cannot share a forward pass.
        NotFinite: some samples' latents are no longer finite.
    """
    if len({sample.cohort for sample in samples}) != 1:
        raise ValueError(f"samples of one cohort expected, got {sorted({str(s.cohort) for s in samples})}")
    positive = [sample.positive for sample in samples]
    predictions = predict(
        model,
        torch.cat([sample.latents for sample in samples]).to(positive[0].dtype),
        torch.tensor([sample.timestep for sample in samples], device=samples[0].latents.device),
        positive,
        [sample.negative for sample in samples if sample.negative is not None] if samples[0].guided else None,
        [sample.guidance for sample in samples],
        fuse_guidance_tokens // samples[0].tokens,
    )
    before = [sample.snapshot() for sample in samples]
    try:
        for sample, prediction in zip(samples, predictions.split(1), strict=True):
            sample.apply(prediction)
    except BaseException:
        for sample, snapshot in zip(samples, before, strict=True):
            sample.restore(snapshot)
        raise
    finite = torch.stack([sample.latents.isfinite().all() for sample in samples]).tolist()  # the only wait for the GPU
    if not all(finite):
        raise NotFinite([sample for sample, good in zip(samples, finite, strict=True) if not good])


def denoise(
    models: Mapping[Expert, torch.nn.Module],
    sample: Sample,
    on_step: Callable[[Sample], None] | None = None,
    fuse_guidance_tokens: int = 8192,
) -> torch.Tensor:
    """Do all remaining steps of one sample.

    Args:
        models: the experts, by name.
        sample: moves to its last step.
        on_step: called after every step.
        fuse_guidance_tokens: see `advance`.

    Returns:
        The final latents, `[1, channels, frames, height, width]`, float32.
    """
    while not sample.finished:
        advance(models[sample.expert], [sample], fuse_guidance_tokens)
        if on_step is not None:
            on_step(sample)
    return sample.latents


def predict(
    model: Any,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    positive: list[torch.Tensor],
    negative: list[torch.Tensor] | None,
    scales: list[float],
    fuse: int,
) -> torch.Tensor:
    """Return the guided noise prediction, in the shape of the latents.

    Args:
        model: see `advance`.
        latents: `[samples, channels, frames, height, width]` in the model's dtype.
        timesteps: `[samples]`.
        positive: embedding of each sample's prompt, `[1, tokens, dim]`.
        negative: embedding of each sample's negative prompt; None without guidance.
        scales: guidance scale of each sample.
        fuse: both halves of guidance are one forward pass if it then has at most so many samples.
    """
    if negative is None:
        return model(latents, timesteps, positive)
    guidance = model.guidance
    if guidance.size == 2:  # other ranks predict the other half at the same time
        half = model(latents, timesteps, negative if guidance.index else positive)
        conditional, unconditional = guidance.gather(half)
    elif 2 * len(latents) <= fuse:
        both = model(latents.repeat(2, 1, 1, 1, 1), timesteps.repeat(2), positive + negative)
        conditional, unconditional = both.chunk(2)
    else:
        conditional = model(latents, timesteps, positive)
        unconditional = model(latents, timesteps, negative)
    # Sample by sample, so that the scale is a Python number as in WanPipeline: a bfloat16 tensor would round it.
    return torch.cat(
        [
            without + scale * (with_prompt - without)
            for scale, with_prompt, without in zip(scales, conditional.split(1), unconditional.split(1), strict=True)
        ]
    )
