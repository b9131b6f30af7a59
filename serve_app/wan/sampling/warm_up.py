"""Warm-up of an expert: kernels are loaded and graphs compiled before anybody waits for a video."""

from __future__ import annotations

import time
from typing import Any

import torch

from serve_app.logs import get_logger
from serve_app.request import Params
from serve_app.wan.sampling.sample import Sample
from serve_app.wan.sampling.sampler import advance
from serve_app.wan.text import Embedding
from serve_app.wan.weights.checkpoint import Checkpoint

logger = get_logger(__name__)


def warm_up(
    model: Any,
    checkpoint: Checkpoint,
    params: Params,
    batch: int,
    fuse_guidance_tokens: int,
    dtype: torch.dtype,
    compiled: bool,
) -> None:
    """Run an expert at the size of `params` and, if it is compiled, at other sizes as well.

    The compiler treats the first sizes of a block as constants, which is fastest, and sizes that change later as
    variables. So the common size comes first, then smaller ones, alone and in batches. After that no request makes it
    compile again.

    Args:
        model: as `load_expert` returns it.
        checkpoint: the checkpoint of the expert.
        params: the common size of videos.
        batch: most samples in a forward pass.
        fuse_guidance_tokens: see `advance`.
        dtype: dtype of the model's activations.
        compiled: whether the model's blocks are compiled.
    """
    device = next(model.parameters()).device
    text = Embedding(torch.zeros(1, int(model.config.text_dim)), tokens=1, truncated=False)

    def run(size: Params, samples: int, fuse: int) -> None:
        started = time.monotonic()
        # A new sample belongs to the first expert; here any expert may run it.
        warmed = [
            Sample.start(size, checkpoint, text, text if size.guided else None, device, dtype, "warm-up")
            for _ in range(samples)
        ]
        advance(model, warmed, fuse)
        logger.info(
            "warmed up",
            extra={
                "size": f"{size.width}x{size.height}, {size.num_frames} frames",
                "samples": samples,
                "seconds": round(time.monotonic() - started, 2),
            },
        )

    run(params, 1, fuse_guidance_tokens)
    if not compiled:
        return
    small = params.model_copy(update={"width": 64, "height": 64, "num_frames": 5})
    smaller = params.model_copy(update={"width": 48, "height": 32, "num_frames": 1})
    for size in (small, smaller):
        run(size, 1, 0)
    # Batches of one, two and three: from the third on, their size is a variable. Fused guidance doubles the batch.
    for samples in range(2, min(batch, 3) + 1):
        run(smaller, samples, 0)
    for samples in range(1, min(batch, 2) + 1):
        run(smaller, samples, fuse_guidance_tokens)
