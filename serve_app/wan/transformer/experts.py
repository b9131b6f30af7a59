"""The experts of one rank, by name, and which one is at hand.

Knows nothing of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from serve_app.wan.offload.block_swap import BlockSwap
from serve_app.wan.weights.checkpoint import Expert


class Experts:
    """Loaded experts.

    Args:
        names: which ones.
        load: makes one, its blocks in `slots` if there are any.
        slots: device memory that the blocks take turns in; None where all of them stay there.
    """

    def __init__(
        self, names: Iterable[Expert], load: Callable[[Expert], nn.Module], slots: BlockSwap | None = None
    ) -> None:
        self._slots = slots
        self._models: dict[Expert, nn.Module] = {name: load(name) for name in names}

    @property
    def names(self) -> tuple[Expert, ...]:
        """Those that are here."""
        return tuple(self._models)

    @property
    def device_bytes(self) -> int:
        """Memory of all weights on the device."""
        storages = (p.untyped_storage() for model in self._models.values() for p in model.parameters())
        # Blocks that take turns have the same memory.
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())

    def use(self, name: Expert) -> nn.Module:
        """An expert, whose blocks are on the device by the time they run."""
        if self._slots is not None:
            self._slots.prefetch(name)
        return self._models[name]

    def forget_texts(self) -> None:
        """Free what is kept of the texts of the last steps."""
        for model in self._models.values():
            model.text_cache.clear()  # type: ignore[operator, union-attr]
