"""The times that were measured of A14B on GPUs, with the files of `benchmarks/results` that they are from.

A test compares each number with its file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """A compiled forward pass of one half of guidance, 81 frames, bfloat16.

    Attributes:
        card: kind of GPU.
        sequence, tensor: ranks that share it.
        tokens: of the sample.
        seconds: of the pass.
        file: the results.
    """

    card: str
    sequence: int
    tensor: int
    tokens: int
    seconds: float
    file: str


@dataclass(frozen=True)
class Job:
    """A job of 40 guided steps and 81 frames over HTTP, from the request to the stored file.

    Attributes:
        card: kind of GPU.
        guidance, sequence, tensor: the mesh.
        tokens: of the sample.
        seconds: of the job.
        file: the results.
    """

    card: str
    guidance: int
    sequence: int
    tensor: int
    tokens: int
    seconds: float
    file: str


AT_480P, AT_720P = 32_760, 75_600
"""Tokens of 81 frames at 832x480 and at 1280x720."""

_H100 = "2026-11-25-a14b-2xh100"
_TENSOR_2 = "2026-11-29-a14b-tensor-parallel-jobs-2xh200"
_TENSOR_4 = "2026-11-27-a14b-shared-tokens-4xh200"
_SYMMETRIC = "2026-11-28-a14b-symmetric-memory-2xh200"

PASSES = (
    Pass("h100-80", 1, 1, AT_480P, 2.404, _H100),
    Pass("h100-80", 1, 1, AT_720P, 9.273, _H100),
    Pass("h100-80", 2, 1, AT_480P, 1.328, _H100),
    Pass("h100-80", 2, 1, AT_720P, 4.848, _H100),
    Pass("h100-80", 1, 2, AT_480P, 1.401, _H100),
    Pass("h100-80", 1, 2, AT_720P, 4.962, _H100),
    Pass("h200", 1, 1, AT_480P, 2.343, _TENSOR_4),
    Pass("h200", 1, 1, AT_720P, 9.099, _TENSOR_4),
    Pass("h200", 2, 1, AT_480P, 1.386, _SYMMETRIC),
    Pass("h200", 2, 1, AT_720P, 4.845, _SYMMETRIC),
    Pass("h200", 1, 2, AT_480P, 1.288, _TENSOR_2),
    Pass("h200", 1, 2, AT_720P, 4.766, _TENSOR_2),
    Pass("h200", 1, 4, AT_480P, 0.780, _TENSOR_4),
    Pass("h200", 1, 4, AT_720P, 2.656, _TENSOR_4),
)
"""Forward passes, the latest of each kind."""

JOBS = (
    Job("h100-80", 2, 1, 1, AT_480P, 105.70, _H100),
    Job("h100-80", 2, 1, 1, AT_720P, 403.44, _H100),
    Job("h200", 2, 1, 1, AT_480P, 102.42, _TENSOR_2),
    Job("h200", 2, 1, 1, AT_720P, 379.27, _SYMMETRIC),
)
"""Whole jobs, the latest of each kind. Those at 832x480 were extrapolated from fewer steps."""

JOB_FACTOR = 1.04
"""Factor by which a step of a job is longer than its passes alone. It has padded texts and halves of guidance that
meet, and waits for the slower card."""
DECODE_TFLOPS = {"float32": 96.0, "bfloat16": 151.0}
"""TFLOP/s of a decode on one H200, by the VAE's dtype: 6.67 s at 1280x720 (2026-11-26-a14b-2xh200), and 4.23 s
(2026-11-24-a14b-1xh200)."""
ENCODE_TFLOPS = 138.0
"""TFLOP/s of the text encoder on one H200 (0.070 s in 2026-11-26-a14b-2xh200)."""
ENCODE_TFLOPS_PER_CPU = 0.112
"""TFLOP/s of the text encoder on one CPU core (5.350 s on 16 cores in 2026-11-28-a14b-norms-24gb-2xh200)."""
OTHER_S = (0.45, 0.75)
"""Seconds of a job outside of the models: of any, and more with the pixels of 1280x720 and 81 frames."""
EAGER_FACTOR = 1.25
"""Factor by which a pass is longer whose blocks are not compiled."""
