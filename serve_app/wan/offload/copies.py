"""Copies between host and device memory that run beside the work of the device.

Knows neither blocks nor models.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Copies(Protocol):
    """Copies beside the work of a device, in the order in which they are asked for."""

    def done(self) -> Any:
        """An event: the work that the device has been given so far is done."""

    def start(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Copy, not before the event `after`; returns the event that it is done."""

    def wait(self, event: Any) -> None:
        """Have the work that the device is given from now on wait for an event."""


class StreamCopies:
    """Copies on a CUDA stream of their own. Nobody waits for them but the kernels that need the data."""

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
