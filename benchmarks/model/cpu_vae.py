"""The VAE's layers for CPUs against diffusers' own: CPU-seconds of a decode in one thread, and how much frames differ.

python -m benchmarks.model.cpu_vae [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from diffusers import AutoencoderKLWan

from benchmarks.machine import describe
from serve_app.tiny import CHECKPOINT
from serve_app.wan.vae import cpu_layers as cpu_vae

CLIPS = {
    "default, 128x128, 33 frames": (1, 9, 16, 16),
    "four of them": (4, 9, 16, 16),
    "preview, 64x64, 9 frames": (1, 3, 8, 8),
}
"""Samples, and latent frames, height and width."""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain, ours = (AutoencoderKLWan.from_pretrained(CHECKPOINT / "vae", dtype=torch.float32).eval() for _ in range(2))
    cpu_vae.speed_up(ours)
    print(f"\n{describe()}; {options.rounds} rounds, alternated, medians\n")
    print("| clip | diffusers CPU s | ours CPU s | ratio | relative difference | largest, of 255 |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, (samples, frames, height, width) in CLIPS.items():
        latents = torch.randn(samples, 16, frames, height, width, generator=torch.Generator().manual_seed(0))
        expected, got = (vae.decode(latents, return_dict=False)[0] for vae in (plain, ours))
        spent: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.rounds):
            for vae, seconds in zip((plain, ours), spent, strict=True):
                began = time.process_time()
                vae.decode(latents, return_dict=False)
                seconds.append(time.process_time() - began)
        before, after = (statistics.median(seconds) for seconds in spent)
        relative = ((got - expected).norm() / expected.norm()).item()
        largest = (got - expected).abs().max().item() * 127.5
        print(
            f"| {name} | {before:.2f} | {after:.2f} | {before / after:.2f} | {relative:.1e} | {largest:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
