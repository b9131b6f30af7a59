"""The host does not wait for the device while it hands out the work of a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.model.parity import CASES
from serve_app.wan.generate import Generator
from serve_app.wan.sampling.sampler import predict

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("fuse", [0, 8])
def test_the_host_does_not_wait_in_the_forward_passes_of_a_step(checkpoint: Path, fuse: int) -> None:
    generator = Generator(checkpoint, torch.device("cuda", 0), torch.bfloat16)
    sample = generator.start(next(iter(CASES.values())))
    assert sample.negative is not None
    model = generator.experts[sample.expert]
    latents = sample.latents.to(torch.bfloat16)
    timesteps = torch.tensor([sample.timestep], device="cuda")

    def run() -> None:
        predict(model, latents, timesteps, [sample.positive], [sample.negative], [4.0], fuse)  # type: ignore[list-item]

    with torch.no_grad():
        for _ in range(2):  # what is loaded on first use, and the texts' keys and values
            run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # raises where something waits
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
