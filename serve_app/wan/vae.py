"""Latents to frames, equal to those of `diffusers.WanPipeline`. Knows nothing of files or codecs."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from serve_app.wan import cpu_vae
from serve_app.wan.checkpoint import Checkpoint


class VideoDecoder:
    """The decoder half of a checkpoint's VAE.

    Args:
        checkpoint: where to load from.
        device: where to run.
        dtype: of the weights. float32 is what Wan advises; bfloat16 halves time and memory.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        vae = AutoencoderKLWan.from_pretrained(checkpoint.folder / "vae", dtype=dtype, use_safetensors=True)
        del vae.encoder, vae.quant_conv  # never used here: a third of the weights
        self.vae = vae.eval().requires_grad_(False).to(device)
        if device.type == "cpu" and dtype == torch.float32:
            cpu_vae.speed_up(self.vae)
        self.device = device
        self.dtype = dtype
        statistics = (vae.config.latents_mean, vae.config.latents_std)
        self._mean, self._std = (torch.tensor(values).view(1, -1, 1, 1, 1).to(device, dtype) for values in statistics)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Frames of a batch of latents.

        Args:
            latents: `[batch, channels, frames, height, width]`, any float dtype and device.

        Returns:
            `[batch, 4 * (frames - 1) + 1, 8 * height, 8 * width, 3]`, uint8 RGB. Values are rounded to the nearest
            level, as WanPipeline's `output_type="pil"` does; diffusers' `export_to_video` cuts them off instead, which
            is darker by half a level.
        """
        latents = latents.to(self.device, self.dtype)
        # Division by the inverse, not multiplication: the last bit is that of WanPipeline.
        latents = latents / (1.0 / self._std) + self._mean
        video = self.vae.decode(latents, return_dict=False)[0]
        video = (video * 0.5 + 0.5).clamp(0, 1)
        # Levels are computed on the device and sample by sample: a quarter of the transfer, and no second float copy.
        frames = [sample.permute(1, 2, 3, 0).float().mul(255).round().to(torch.uint8).cpu() for sample in video]
        return torch.stack(frames).numpy()
