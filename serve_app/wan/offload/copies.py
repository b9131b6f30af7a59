"""Copies between host and device memory that run beside the work of the device.

Knows neither blocks nor models.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Copies(Protocol):
    """Copies that run beside the work of a device, in the order in which they were started."""

    def done(self) -> Any:
        """Return an event: the device has done all work that it was given so far."""

    def start(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Begin to copy, not before the event `after`. Return the event that the copy is done."""

    def wait(self, event: Any) -> None:
        """Make the work that the device is given from now on wait for an event."""


class StreamCopies:
    """Copies on a CUDA stream of their own. Only the kernels that need the data wait for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def done(self) -> torch.cuda.Event:
        """See `Copies`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def start(self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event | None) -> torch.cuda.Event:
        """See `Copies`."""
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        """See `Copies`."""
        torch.cuda.current_stream(self._device).wait_event(event)


class PlainCopies:
    """Copies on a CPU, which does one thing after the other."""

    def done(self) -> None:
        """See `Copies`."""

    def start(self, target: torch.Tensor, source: torch.Tensor, after: None) -> None:
        """See `Copies`."""
        target.copy_(source)

    def wait(self, event: None) -> None:
        """See `Copies`."""
