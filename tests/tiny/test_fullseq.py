"""The full-sequence autoencoder of the recipe equals diffusers' chunked one."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from serve_app.tiny.recipe import fullseq


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (5, 16, 48), (17, 48, 32)])
def test_full_sequence_equals_chunks(frames: int, height: int, width: int) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    clip = torch.rand(2, 3, frames, height, width) * 2 - 1
    with torch.no_grad():
        chunked = vae.encode(clip).latent_dist.mean
        whole = fullseq.encode(vae, clip)
        assert torch.allclose(whole, chunked, atol=1e-5, rtol=1e-4)
        decoded = vae.decode(chunked, return_dict=False)[0]
        assert torch.allclose(fullseq.decode(vae, chunked).clamp(-1, 1), decoded, atol=1e-5, rtol=1e-4)
