"""A decode where memory is really short: a process of its own that is refused what goes beyond a limit.

    python -m tests.support.short_memory MIB...

prints a line of JSON for each limit: for each of two decodes under it how many tiles there were in the end, how many
did not fit and how far the frames are from those made without a limit; and after how many without it tiles are `whole`
again. Or `error`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from serve_app.compute import is_out_of_memory
from serve_app.wan.vae import cpu_layers as cpu_vae
from serve_app.wan.vae.tiled_decoder import RETRY_LARGER_AFTER, TiledDecoder

SHAPE = (1, 16, 2, 24, 32)


def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    made = AutoencoderKLWan(base_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    cpu_vae.speed_up(made)
    return made


def latents() -> torch.Tensor:
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0))


class Count(logging.Handler):
    """A handler that counts what is logged."""

    records = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.records += 1


def decode(mib: float) -> None:
    torch.set_num_threads(1)
    count = Count()
    logging.getLogger("serve_app").addHandler(count)
    decoder = TiledDecoder([vae()])
    decoder.decode(latents()[..., :8, :8])  # what is loaded on first use
    held = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert held is not None
    limit = (int(held[1]) << 10) + int(mib * 2**20)
    told = []
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
        videos = []
        for _ in range(2):
            before = count.records
            videos.append(decoder.decode(latents()))
            told.append({"tiles": len(decoder.tiles), "failed": count.records - before})
    except (RuntimeError, MemoryError) as error:
        print(json.dumps({"error": str(error), "out_of_memory": is_out_of_memory(error)}))
        return
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    expected = TiledDecoder([vae()]).decode(latents()).int()
    whole = 0
    while len(decoder.tiles) > 1:
        for _ in range(RETRY_LARGER_AFTER):
            decoder.decode(latents()[..., :8, :8])
        decoder.decode(latents())
        whole += RETRY_LARGER_AFTER + 1
    for video, one in zip(videos, told, strict=True):
        one["off"] = int((video.int() - expected).abs().max())
    print(json.dumps({"decodes": told, "levels": int(expected.max() - expected.min()), "whole": whole}))


def main() -> None:
    """Decode under each limit in a process of its own, which has the imports of this one."""
    for mib in sys.argv[1:]:
        if (pid := os.fork()) == 0:
            decode(float(mib))
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"the decode with {mib} MiB broke off")


if __name__ == "__main__":
    main()
