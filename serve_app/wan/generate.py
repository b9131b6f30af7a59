"""The whole model path in one process, from a prompt to frames, for notebooks and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from serve_app.request import Params
from serve_app.wan.parallel.process_groups import ProcessGroups
from serve_app.wan.sampling.sample import Sample
from serve_app.wan.sampling.sampler import denoise
from serve_app.wan.text import TextEncoder
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.vae.decoder import VideoDecoder
from serve_app.wan.weights.checkpoint import Checkpoint, Expert


class Generator:
    """A checkpoint loaded as a whole: text encoder, both experts, video decoder.

    Args:
        folder: in the diffusers layout.
        device: where everything runs.
        dtype: of text encoder and experts; the video decoder is float32.
        groups: the ranks that share the experts, which all make the same calls; None for this process alone.
        compiled: see `load_expert`.
        random: use random weights, see `Checkpoint`.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        groups: ProcessGroups | None = None,
        compiled: bool = False,
        random: bool = False,
    ) -> None:
        device = torch.device(device)
        self.checkpoint = Checkpoint(folder, random)
        self.device = device
        self.dtype = dtype
        self.text = TextEncoder(self.checkpoint, device, dtype)
        groups = groups or ProcessGroups.alone(device)
        self.experts: dict[Expert, nn.Module] = {
            expert: load_expert(self.checkpoint, expert, groups, dtype, device, compiled=compiled)
            for expert in self.checkpoint.experts
        }
        self.decoder = VideoDecoder(self.checkpoint, device, torch.float32)

    def start(self, params: Params) -> Sample:
        """Return a sample before its first step."""
        prompts = [params.prompt, params.negative_prompt] if params.guided else [params.prompt]
        # One prompt at a time, so that numbers equal those of WanPipeline, which encodes them in two passes.
        embeddings = [self.text.encode([prompt])[0] for prompt in prompts]
        negative = embeddings[1] if params.guided else None
        return Sample.start(params, self.checkpoint, embeddings[0], negative, self.device, self.dtype)

    def latents(self, params: Params, on_step: Callable[[Sample], None] | None = None) -> torch.Tensor:
        """Return denoised latents, `[1, channels, frames, height, width]`, float32."""
        return denoise(self.experts, self.start(params), on_step)

    def frames(self, params: Params, on_step: Callable[[Sample], None] | None = None) -> np.ndarray:
        """Return a video, `[frames, height, width, 3]`, uint8 RGB."""
        return self.decoder.decode(self.latents(params, on_step))[0]


def generate(folder: Path, params: Params, device: torch.device | str = "cpu") -> np.ndarray:
    """Return one video, `[frames, height, width, 3]`, uint8 RGB. For more than one, keep a `Generator`."""
    return Generator(folder, device).frames(params)
