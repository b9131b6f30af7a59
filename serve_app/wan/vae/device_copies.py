"""Copies of tensors from a device to host memory, and waiting for a device. Knows nothing of videos."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def host_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an empty tensor in host memory, pinned if `device` is a GPU."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=device.type == "cuda")


def to_host(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in host memory. The copy may still be under way, see `synchronize`."""
    return x if x.device.type == "cpu" else host_empty(x.shape, x.dtype, x.device).copy_(x, non_blocking=True)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """Return the event that a GPU has done all work that it was given so far; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all work that it was given."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
