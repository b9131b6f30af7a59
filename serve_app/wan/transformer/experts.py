"""The loaded experts of one rank, by name.

Knows nothing of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from serve_app.wan.offload.block_swap import BlockSwap
from serve_app.wan.weights.checkpoint import Expert


class Experts:
    """The loaded experts of one rank.

    Args:
        names: the experts to load.
        load: loads one expert, with `block_swap` if there is one.
        block_swap: device memory in which the blocks take turns; None where all of them stay on the device.
    """

    def __init__(
        self, names: Iterable[Expert], load: Callable[[Expert], nn.Module], block_swap: BlockSwap | None = None
    ) -> None:
        self._block_swap = block_swap
        self._models: dict[Expert, nn.Module] = {name: load(name) for name in names}

    @property
    def names(self) -> tuple[Expert, ...]:
        """Names of the loaded experts."""
        return tuple(self._models)

    @property
    def device_bytes(self) -> int:
        """Bytes of all weights on the device."""
        storages = (p.untyped_storage() for model in self._models.values() for p in model.parameters())
        # Blocks that take turns share memory.
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())

    @property
    def text_bytes(self) -> int:
        """Bytes of the cached keys and values of texts."""
        caches: list[Any] = [model.text_cache for model in self._models.values()]
        return sum(cache.bytes for cache in caches)

    def use(self, name: Expert) -> nn.Module:
        """Return an expert, whose blocks are on the device by the time they run."""
        if self._block_swap is not None:
            self._block_swap.prefetch(name)
        return self._models[name]

    def forget_texts(self) -> None:
        """Free the cached keys and values of all texts."""
        for model in self._models.values():
            model.text_cache.clear()  # type: ignore[operator, union-attr]
