"""Decoder of latents to frames, equal to those of `diffusers.WanPipeline`. Knows nothing of video files or codecs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from serve_app.wan.vae.cpu_layers import speed_up
from serve_app.wan.vae.frame_buffer import FrameBuffer
from serve_app.wan.vae.tiled_decoder import TiledDecoder
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.files import check_loading
from serve_app.wan.weights.random_weights import randomise


class VideoDecoder:
    """The decoder half of a checkpoint's VAE.

    Args:
        checkpoint: holds the VAE.
        device: first device to run on.
        dtype: of the weights. Wan advises float32; bfloat16 halves time and memory.
        others: further devices; each gets a copy of the weights and decodes its part of every picture.
        tile_bytes: memory that a tile may take on a device, beside the weights. 0 is what is free on a GPU, and no
            bound on CPUs: whole pictures, if they fit.

    Raises:
        CheckpointError: the weights are not what the configuration asks for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        others: Sequence[torch.device] = (),
        tile_bytes: float = 0,
    ) -> None:
        self._arguments = checkpoint, device, others, tile_bytes
        vae, loading = AutoencoderKLWan.from_pretrained(
            checkpoint.folder / "vae", dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        check_loading(checkpoint.folder / "vae", loading)
        del vae.encoder, vae.quant_conv  # never used here, and a third of the weights
        vae.eval().requires_grad_(False)
        if checkpoint.random:
            randomise(vae)
        copies = [copy.deepcopy(vae).to(other) for other in others]
        self.vae = vae.to(device)
        self.vaes = [self.vae, *copies]
        """The VAE, and its copies on the other devices."""
        for one in self.vaes:
            if one.device.type == "cpu" and dtype == torch.float32:
                speed_up(one)
        self.device = device
        self.dtype = dtype
        self.tiled = TiledDecoder(self.vaes, tile_bytes or math.inf)
        statistics = (vae.config.latents_mean, vae.config.latents_std)
        self._mean, self._std = (torch.tensor(values).view(1, -1, 1, 1, 1).to(device, dtype) for values in statistics)

    def in_float32(self) -> VideoDecoder:
        """Load the same decoder in float32, for latents whose pixels a smaller type overflows on."""
        checkpoint, device, others, tile_bytes = self._arguments
        return VideoDecoder(checkpoint, device, torch.float32, others, tile_bytes)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, frame_buffers: Sequence[FrameBuffer] | None = None) -> np.ndarray:
        """Return the frames of a batch of latents.

        Args:
            latents: `[batch, channels, frames, height, width]`, any float dtype and device.
            frame_buffers: one for each video; it is told of the frames as they come, or of the error.

        Returns:
            `[batch, 4 * (frames - 1) + 1, 8 * height, 8 * width, 3]`, uint8 RGB. Values are rounded to the nearest
            level, as WanPipeline's `output_type="pil"` does; diffusers' `export_to_video` cuts them off instead, which
            is darker by half a level.

        Raises:
            PixelsNotFinite, or the error that a frame buffer was failed with: at least one video has no frames. Raised
                when the batch's other videos are done; their frame buffers have no error.
            MemoryError: not even the smallest tile fits.
        """
        latents = latents.to(self.device, self.dtype)
        # Division by the inverse instead of multiplication: so the last bit is that of WanPipeline.
        return self.tiled.decode(latents / (1.0 / self._std) + self._mean, frame_buffers=frame_buffers).numpy()
