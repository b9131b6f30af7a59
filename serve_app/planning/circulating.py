"""The estimate of this model's memory that circulates, beside ours line by line: `wan-serve plan --explain`.

It is of one A100 with weights in half precision, and counts a model of one transformer like a language model.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.config import Config
from serve_app.planning.memory import (
    CONTEXT_BYTES,
    SLACK,
    STEP,
    TEXTS,
    RankMemory,
    Size,
    decoder_need,
    encoder_need,
)
from serve_app.planning.model_shape import ModelShape
from serve_app.wan.parallel.mesh import Mesh


@dataclass(frozen=True)
class Comparison:
    """A line of both estimates.

    Attributes:
        what: the part of the memory.
        theirs: the GB that circulate, in words; empty where they leave it out.
        ours: bytes by our model.
        why: how they differ.
    """

    what: str
    theirs: str
    ours: float
    why: str


def compare(model: ModelShape, size: Size) -> list[Comparison]:
    """Return both estimates for one GPU that holds everything; the last line is the sum.

    Args:
        model: the model's shape.
        size: of the video.
    """
    config = Config.model_validate(
        {
            "denoiser": {"compile": True, "memory_fraction": 0.5, "rank": {"num_gpus": 0.5}},
            "encoder": {"memory_fraction": 0.2, "resources": {"num_gpus": 0.2}},
            "decoder": {"memory_fraction": 0.2, "resources": {"num_gpus": 0.2}},
        }
    )
    held = tuple(range(len(model.experts)))
    rank = RankMemory(config, model, Mesh(), held).need(size)
    texts, pictures = encoder_need(config, model), decoder_need(config, model, size)
    lines = [
        Comparison(
            "weights of the transformers",
            "28",
            rank.weights,
            f"28.6 GB is one expert; there are {len(model.experts)}, of which one works at a time",
        ),
        Comparison("text encoder", "", texts.total, "left out; it has 5.7 billion parameters of its own"),
        Comparison("VAE and a picture", "", pictures.total, "left out; the picture takes more than the weights"),
        Comparison(
            "cache",
            "4-6",
            rank.bytes_of(TEXTS),
            "nothing grows with the steps: only the texts' keys and values are kept, and no step changes them",
        ),
        Comparison("activations", "6-8", rank.bytes_of(STEP), "of compiled blocks, at this size; more without"),
        Comparison("temporaries", "2-4", rank.bytes_of(SLACK), "what the allocator holds beyond the peak"),
        Comparison("CUDA contexts", "", 3 * CONTEXT_BYTES, "of three processes"),
    ]
    return [*lines, Comparison("together", "36-46", sum(line.ours for line in lines), _sum(model))]


def _sum(model: ModelShape) -> str:
    return f"of {model.source}; a GB is 10^9 bytes"
