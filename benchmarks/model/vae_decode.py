"""What a decode takes, in seconds and memory: diffusers' own, ours of whole pictures, and ours in tiles.

    python -m benchmarks.model.vae_decode [--vae DIR] [--sizes 832x480,1280x720] [--frames 81] [--dtype float32]
                                    [--tile-mib 0,7000,4000] [--devices cuda:0,cuda:1] [--rounds 3]

Without a folder the VAE is that of Wan2.2-T2V-A14B with random weights. The rows of a size: ours on the first device,
whole (a bound of 0) or in tiles; ours on all devices; diffusers' own, on the first. Differences are to the first row,
relative ones of the norms of frames before rounding, and the largest one of levels. On CUDA, memory is the most that
PyTorch had allocated beyond what lay there before, weights left out, and `reserved` what it held of the device in all;
elsewhere it is what `Picture.tile_bytes` says of the largest tile, in brackets.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from benchmarks.machine import describe
from serve_app.wan.vae import cpu_layers as cpu_vae
from serve_app.wan.vae.tiled_decoder import TiledDecoder
from serve_app.wan.vae.tiles import Picture

Decode = Callable[[torch.Tensor, bool], torch.Tensor]
"""Latents, and whether to leave out rounding, to `[samples, frames, height, width, 3]` in host memory."""


@dataclass(frozen=True)
class Row:
    """What was measured of one way to decode."""

    seconds: float
    allocated: int
    reserved: int
    frames: torch.Tensor
    levels: torch.Tensor


def load(folder: Path | None, device: torch.device, dtype: torch.dtype) -> AutoencoderKLWan:
    """The decoder half of a VAE, made or read on the device."""
    if folder is None:
        torch.manual_seed(0)
        with device:
            vae = AutoencoderKLWan()
    else:
        vae = AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    del vae.encoder, vae.quant_conv
    return vae.eval().requires_grad_(False).to(device, dtype)


def diffusers_decode(vae: AutoencoderKLWan) -> Decode:
    """As WanPipeline does it, up to the frames' bytes."""

    def decode(latents: torch.Tensor, raw: bool) -> torch.Tensor:
        video = vae.decode(latents, return_dict=False)[0]
        if not raw:
            video = (video * 0.5 + 0.5).clamp(0, 1).float().mul(255).round().to(torch.uint8)
        return video.permute(0, 2, 3, 4, 1).cpu()

    return decode


@torch.no_grad()
def measure(decode: Decode, latents: torch.Tensor, rounds: int, devices: Sequence[torch.device]) -> Row:
    """Once for the frames, once to warm up, and then timed."""
    frames = decode(latents, True).float()
    cuda = [device for device in devices if device.type == "cuda"]
    decode(latents, False)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    before = {}
    for device in cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before[device] = torch.cuda.memory_allocated(device)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        levels = decode(latents, False)  # ends in host memory, so nothing is left to wait for
        seconds.append(time.perf_counter() - began)
    return Row(
        statistics.median(seconds),
        max((torch.cuda.max_memory_allocated(device) - before[device] for device in cuda), default=0),
        max(map(torch.cuda.max_memory_reserved, cuda), default=0),
        frames,
        levels.int(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, help="folder of a VAE; random weights of A14B's configuration if not given")
    parser.add_argument("--sizes", default="832x480,1280x720", help="WIDTHxHEIGHT of each, both multiples of 8")
    parser.add_argument("--frames", type=int, default=81, help="4 k + 1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tile-mib", default="0,7000,4000,2000", help="bounds of a tile's memory; 0 is none")
    parser.add_argument("--devices", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--channels-last", action="store_true", help="weights in the other order, also of diffusers")
    options = parser.parse_args()
    devices = [torch.device(name) for name in options.devices.split(",")]
    dtype = getattr(torch, options.dtype)
    vae = load(options.vae, devices[0], dtype)
    if options.channels_last:
        for layer in vae.modules():
            if isinstance(layer, torch.nn.Conv3d):
                layer.to(memory_format=torch.channels_last_3d)
    plain, copies = copy.deepcopy(vae), [vae, *(copy.deepcopy(vae).to(device) for device in devices[1:])]
    for one in copies:
        if one.device.type == "cpu" and dtype == torch.float32:
            cpu_vae.speed_up(one)
    names = [torch.cuda.get_device_name(device) for device in devices if device.type == "cuda"]
    order = ", channels last" if options.channels_last else ""
    print(f"\n{describe()}{''.join(f'; {name}' for name in names)}; {options.rounds} rounds, medians")
    print(f"{options.dtype}{order}, {options.frames} frames, {options.vae or 'random weights of the shape of A14B'}\n")
    print(
        "| size | who | devices | tile MiB | tiles | s | MiB a device | reserved MiB | relative difference | levels |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for size in options.sizes.split(","):
        width, height = (int(side) // 8 for side in size.split("x"))
        shape = (1, vae.config.z_dim, (options.frames - 1) // 4 + 1, height, width)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(devices[0], dtype)
        reference: Row | None = None
        ways: list[tuple[str, list[AutoencoderKLWan], float]] = []
        for mib in map(float, options.tile_mib.split(",")):
            ways.append(("ours", copies[:1], mib))
            if len(copies) > 1:
                ways.append(("ours", copies, mib))
        for who, those, mib in [*ways, ("diffusers", [plain], 0.0)]:
            ours = TiledDecoder(those, mib * 2**20 or math.inf)
            decode = diffusers_decode(plain) if who == "diffusers" else ours.decode
            try:
                row = measure(decode, latents, options.rounds, devices[: len(those)])
            except torch.OutOfMemoryError:
                print(f"| {size} | {who} | {len(those)} | {mib:.0f} | | out of memory | | | | |", flush=True)
                torch.cuda.empty_cache()
                continue
            picture = Picture(ours.levels, height, width, itemsize=dtype.itemsize)
            tiles = ours.tiles or [picture.whole]
            memory = f"{row.allocated / 2**20:.0f}" if row.allocated else ""
            if not memory:
                memory = f"({max(map(picture.tile_bytes, tiles)) / 2**20:.0f})"
            reference = reference or row
            relative = ((row.frames - reference.frames).norm() / reference.frames.norm()).item()
            most = (row.levels - reference.levels).abs().max().item()
            print(
                f"| {size} | {who} | {len(those)} | {mib:.0f} | {len(tiles)} | {row.seconds:.2f} | {memory} | "
                f"{row.reserved / 2**20:.0f} | {relative:.1e} | {most} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
