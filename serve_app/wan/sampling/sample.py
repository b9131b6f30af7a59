"""The sample: one video being denoised, with everything that its next step depends on, and nothing else.

Knows neither the model nor which other samples exist.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Self

import torch
from diffusers import UniPCMultistepScheduler

from serve_app.request import Params
from serve_app.wan.cost import latent_tokens
from serve_app.wan.text import Embedding, pad
from serve_app.wan.weights.checkpoint import Checkpoint, Expert


@dataclass(eq=False)
class Sample:
    """One video being denoised.

    The state is `params`, the two embeddings, `latents`, `step`, and the scheduler's fields that change from step to
    step: `model_outputs`, `timestep_list`, `last_sample`, `lower_order_nums`, `this_order` and the step index. All the
    rest follows from `params` and the checkpoint.

    Attributes:
        params: the generation parameters.
        latents: `[1, channels, frames, height, width]`, float32, on the model's device.
        positive, negative: text embeddings, `[1, 512, dim]` in the model's dtype; negative is None without guidance.
        scheduler: belongs to this sample alone, since it holds the sampler's history.
        boundary: the high-noise expert denoises timesteps of at least this value; None if it does all steps.
        tokens: number of latent tokens after patching, which measures the work of a forward pass.
        name: appears in error messages.
    """

    params: Params
    latents: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor | None
    scheduler: UniPCMultistepScheduler
    boundary: float | None
    tokens: int
    name: str = ""
    step: int = 0
    """Index of the next step."""

    @classmethod
    def start(
        cls,
        params: Params,
        checkpoint: Checkpoint,
        positive: Embedding,
        negative: Embedding | None,
        device: torch.device,
        dtype: torch.dtype,
        name: str = "",
    ) -> Self:
        """Create a sample of pure noise before its first step.

        The noise is drawn on the CPU, so that a seed gives the same video on any hardware and any number of ranks. Its
        values are those of `WanPipeline` with `torch.Generator("cpu").manual_seed(seed)`.

        Args:
            params: the generation parameters.
            checkpoint: gives noise schedule and sizes.
            positive: embedding of the prompt.
            negative: embedding of the negative prompt; not used without guidance.
            device: device of the model.
            dtype: dtype of the model's activations, used for the embeddings; latents are always float32.
            name: appears in error messages.

        Raises:
            ValueError: `params` asks for guidance and there is no negative embedding.
        """
        if params.guided and negative is None:
            raise ValueError(f"sample {name!r}: guidance {params.guidance_scale} needs a negative embedding")
        config = checkpoint.expert_config("transformer")
        shape = (1, int(config["in_channels"]), *params.latent_shape)
        noise = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(params.seed), dtype=torch.float32)
        scheduler = UniPCMultistepScheduler.from_config(checkpoint.scheduler_config, flow_shift=params.flow_shift)
        # Timesteps stay on the CPU, so that choosing the next expert does not wait for the GPU.
        scheduler.set_timesteps(params.num_inference_steps)
        scheduler.set_begin_index(0)
        ratio = checkpoint.boundary_ratio if params.boundary_ratio is None else params.boundary_ratio
        boundary = None if ratio is None else ratio * checkpoint.num_train_timesteps
        return cls(
            params=params,
            latents=noise.to(device),
            positive=pad(positive)[None].to(device, dtype),
            negative=pad(negative)[None].to(device, dtype) if params.guided and negative is not None else None,
            scheduler=scheduler,
            boundary=boundary if checkpoint.has_two_experts else None,
            tokens=latent_tokens(config, params.latent_shape),
            name=name,
        )

    @property
    def steps(self) -> int:
        """Number of all steps."""
        return len(self.scheduler.timesteps)

    @property
    def finished(self) -> bool:
        """True if the latents are final. There is no next step then, and so no timestep, expert or cohort."""
        return self.step >= self.steps

    @property
    def timestep(self) -> int:
        """Timestep of the next step, counting down from the number of training timesteps."""
        return int(self.scheduler.timesteps[self.step])

    @property
    def expert(self) -> Expert:
        """Expert that does the next step."""
        return "transformer" if self.boundary is None or self.timestep >= self.boundary else "transformer_2"

    @property
    def boundary_step(self) -> int:
        """Index of the first step that the low-noise expert does; `steps` if it does none."""
        if self.boundary is None:
            return self.steps
        return int((self.scheduler.timesteps >= self.boundary).sum())

    @property
    def guided(self) -> bool:
        """True if a step also needs the unconditional prediction."""
        return self.params.guided

    @property
    def guidance(self) -> float:
        """Guidance scale of the next step."""
        return self.params.guidance_scale if self.expert == "transformer" else self.params.guidance_scale_2

    @property
    def cohort(self) -> Hashable:
        """Key of the samples that can share a forward pass: latent shape, expert, and guided or not."""
        return (tuple(self.latents.shape), self.expert, self.guided)

    @property
    def state_bytes(self) -> int:
        """Memory of the state between steps in bytes, once the sampler's history is full."""
        history = 1 + len(self.scheduler.model_outputs)  # `last_sample` and the model's outputs
        texts = [text for text in (self.positive, self.negative) if text is not None]
        return self.latents.nbytes * (1 + history) + sum(text.nbytes for text in texts)

    def snapshot(self) -> Self:
        """Return a copy that later steps do not change. It shares the tensors, since a step makes new ones."""
        frozen = copy.copy(self)
        frozen.scheduler = copy.copy(self.scheduler)
        for name in ("model_outputs", "timestep_list"):
            setattr(frozen.scheduler, name, list(getattr(self.scheduler, name)))
        return frozen

    def restore(self, snapshot: Self) -> None:
        """Go back to the state of `snapshot`, which must not be used any more."""
        self.__dict__.update(snapshot.__dict__)

    def to(self, device: torch.device) -> None:
        """Move all tensors that the next step reads to a device."""
        self.latents = self.latents.to(device)
        self.positive = self.positive.to(device)
        self.negative = None if self.negative is None else self.negative.to(device)
        scheduler = self.scheduler
        scheduler.model_outputs = [None if one is None else one.to(device) for one in scheduler.model_outputs]
        scheduler.last_sample = None if scheduler.last_sample is None else scheduler.last_sample.to(device)

    def apply(self, prediction: torch.Tensor) -> None:
        """Take one step of the scheduler along `prediction`, which has the shape of the latents."""
        timestep = self.scheduler.timesteps[self.step]
        self.latents = self.scheduler.step(prediction, timestep, self.latents, return_dict=False)[0]
        self.step += 1
