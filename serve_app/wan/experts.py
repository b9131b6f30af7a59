"""The experts of one rank, and where their weights are while they are not in use.

Knows nothing of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import nn

from serve_app.wan.checkpoint import Expert


class Experts:
    """Loaded experts by name.

    Args:
        names: which ones.
        load: makes one, on the device.
        placement: `together`: all stay on the device. `swap`: all are kept in pinned host memory, and the one in use
            has a copy on the device. On a CPU, whose memory is the host's, both are the same.
    """

    def __init__(
        self,
        names: Iterable[Expert],
        load: Callable[[Expert], nn.Module],
        placement: Literal["together", "swap"],
        device: torch.device,
    ) -> None:
        self._device = device
        self._models: dict[Expert, nn.Module] = {}
        self._host: dict[Expert, list[torch.Tensor]] = {}
        self._current: Expert | None = None
        self._swap = placement == "swap" and device.type != "cpu"
        for name in names:
            self._models[name] = load(name)
            if self._swap:
                self._host[name] = [p.data.cpu().pin_memory() for p in self._models[name].parameters()]
                self._release(name)

    @property
    def names(self) -> tuple[Expert, ...]:
        """Those that are here."""
        return tuple(self._models)

    @property
    def device_bytes(self) -> int:
        """Memory of all parameters that are on the device."""
        parameters = (p for model in self._models.values() for p in model.parameters())
        return sum(p.nbytes for p in parameters if p.device.type == self._device.type)

    def use(self, name: Expert) -> nn.Module:
        """An expert, ready on the device."""
        if self._swap and name != self._current:
            if self._current is not None:
                self._release(self._current)
            for parameter, host in zip(self._models[name].parameters(), self._host[name], strict=True):
                parameter.data = host.to(self._device, non_blocking=True)
            self._current = name
        return self._models[name]

    def forget_texts(self) -> None:
        """Free what is kept of the texts of the last steps."""
        for model in self._models.values():
            model.text_memory.clear()  # type: ignore[operator, union-attr]

    def _release(self, name: Expert) -> None:
        """Free the device's copy. The host's is the original: weights do not change."""
        for parameter, host in zip(self._models[name].parameters(), self._host[name], strict=True):
            parameter.data = host
