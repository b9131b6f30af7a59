"""The words in which a process is refused that cannot fit on its device: one line with option, value and need.

The plan, `check`, `up` and a rank that is about to load all say it like this.
"""

from __future__ import annotations

from serve_app.planning.parts import GIB, ProcessMemory

_LESS = {
    "rank": "denoiser.experts, .offload and .parallel.tensor make it less",
    "encoder": "encoder.device: cpu does without a GPU",
    "decoder": "model.vae_dtype: bfloat16 makes it less",
}


def does_not_fit(need: ProcessMemory, limit: float, device: str) -> str:
    """Return the line for a process that needs more than it may take.

    Args:
        need: of the process.
        limit: bytes that it may take.
        device: the device, in words: `this GPU`, or `an H100 80 GB`.
    """
    return (
        f"{need.option}.memory_fraction has value {need.fraction:g}, {limit / GIB:.1f} GiB of {device}, expected "
        f"{need.least / GIB:.1f} GiB for weights ({need.weights / GIB:.1f}) and {need.work}; {_LESS[need.process]}"
    )
