"""Device memory that the blocks of the experts take turns in, while the others wait in host memory or in files.

One mechanism for experts that take turns and for devices smaller than an expert. Each slot holds the weights of one
block. Where there are as many as an expert has blocks, each block has its own, and a change of expert copies block by
block into them, just ahead of the pass that wants them. Where there are fewer, some blocks stay and the rest pass
through two slots, one being filled while the other is used.

Knows neither samples nor the ranks that share a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from serve_app.errors import ConfigError
from serve_app.logs import get_logger
from serve_app.wan.offload.block_store import BlockStore, Key, Layout
from serve_app.wan.offload.copies import Copies, PlainCopies, StreamCopies
from serve_app.wan.weights.checkpoint import Expert
from serve_app.wan.weights.reader import Weights
from serve_app.wan.weights.shard_spec import ShardSlice

logger = get_logger(__name__)

PASSING = 2
"""Slots that blocks pass through: one to use, one to fill."""


@dataclass
class _Slot:
    """`holds` is whose weights are in it, or on their way; `arrival` gives the event that they are there, None once the
    device has been told to wait for it; `left` is the event that the last pass through it is done."""

    memory: torch.Tensor
    views: list[torch.Tensor]
    holds: Key | None = None
    arrival: Callable[[], Any] | None = None
    left: Any = None


class BlockSwap:
    """The slots of one rank.

    Args:
        store: where the blocks wait.
        staying: how many blocks of an expert stay on the device; None is as many as there is room for.
        room: bytes of the device that all slots may take.
        copies: how they get there; by what the device is, if not given.
    """

    def __init__(
        self,
        device: torch.device,
        store: BlockStore,
        staying: int | None = None,
        room: float = math.inf,
        copies: Copies | None = None,
    ) -> None:
        self._device = device
        self._store = store
        self._staying = staying
        self._room = room
        self._copies: Copies = copies or (StreamCopies(device) if device.type == "cuda" else PlainCopies())
        self._blocks: dict[Key, list[nn.Parameter]] = {}
        self._bound: dict[Key, _Slot] = {}  # whose memory the parameters are
        self._slots: list[_Slot] = []
        self._place: dict[Key, _Slot] = {}
        self._stay: dict[int, int] = {}  # the slot of each layer that stays
        self._pass: list[int] = []  # the layers that do not
        self._next = 0
        self._expert: Expert | None = None

    def take(self, expert: Expert, blocks: Sequence[nn.Module], parts: Sequence[ShardSlice], weights: Weights) -> None:
        """Bring in an expert. Its forward pass calls `wait_for_block` before each block, and `release_block` after it.

        Args:
            parts: of `weights`, all that are the blocks' parameters, by their name in the expert.

        Raises:
            CheckpointError: the weights are damaged.
            ConfigError: there is no room for blocks to pass through.
        """
        by_layer = [[part for part in parts if part.name.split(".")[1] == str(layer)] for layer in range(len(blocks))]
        layout = Layout.of(by_layer[0])
        if not self._slots:
            self._allocate(layout, len(blocks))
        for layer, (block, mine) in enumerate(zip(blocks, by_layer, strict=True)):
            key = (expert, layer)
            self._store.take(key, layout, mine, weights)
            slot = self._slots[self._stay.get(layer, len(self._slots) - 1)]
            parameters = []
            for part, view in zip(layout.order(mine), slot.views, strict=True):
                owner, _, leaf = part.name.split(".", 2)[2].rpartition(".")
                parameter = nn.Parameter(view, requires_grad=False)
                setattr(block.get_submodule(owner), leaf, parameter)
                parameters.append(parameter)
            self._blocks[key], self._bound[key] = parameters, slot

    @property
    def device_bytes(self) -> int:
        """Memory of all slots."""
        return sum(slot.memory.nbytes for slot in self._slots)

    def use(self, expert: Expert) -> None:
        """Begin to fetch an expert, unless it is the one in use. Its first pass waits for one block at a time."""
        if expert == self._expert:
            return
        self._expert = expert
        self._next = 0
        layers = sorted([*self._stay, *self._pass[:PASSING]])
        for layer in layers:
            self._fetch((expert, layer))

    def wait_for_block(self, expert: Expert, layer: int) -> None:
        """Have a block's weights on the device before it runs; the device waits, not this thread, where it can.

        Raises:
            CheckpointError: the weights are damaged.
        """
        key = (expert, layer)
        if key not in self._place:
            self._fetch(key)
        slot = self._place[key]
        if slot.arrival is not None:
            try:
                event = slot.arrival()
            except BaseException:  # not there, so whoever wants it next fetches it again
                self._forget(slot)
                raise
            self._copies.wait(event)
            slot.arrival = None
        if self._bound[key] is not slot:
            for parameter, view in zip(self._blocks[key], slot.views, strict=True):
                parameter.data = view
            self._bound[key] = slot

    def release_block(self, expert: Expert, layer: int) -> None:
        """Note that a block has run, and fetch into its slot the block that comes through there next."""
        slot = self._place[expert, layer]
        slot.left = self._copies.done()
        if layer in self._pass:
            behind = self._pass[(self._pass.index(layer) + PASSING) % len(self._pass)]
            if (expert, behind) not in self._place:
                self._fetch((expert, behind), slot)

    def _allocate(self, layout: Layout, layers: int) -> None:
        fit = layers if self._room >= layers * layout.nbytes else int(self._room // layout.nbytes)
        count = min(layers, fit if self._staying is None else self._staying + PASSING)
        if count < min(layers, PASSING):
            raise ConfigError(
                f"denoiser.memory_fraction leaves {max(0.0, self._room) / 2**20:.0f} MiB for blocks beside a step of "
                f"the largest request, expected {PASSING * layout.nbytes / 2**20:.0f} MiB or more, for {PASSING} blocks"
            )
        staying = count if count == layers else count - PASSING
        for _ in range(count):
            memory = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
            self._slots.append(_Slot(memory, layout.views(memory)))
        passing = layers - staying
        logger.info("blocks", extra={"layers": layers, "staying": staying, "mib_each": round(layout.nbytes / 2**20, 1)})
        # Evenly among those that stay, whose time is then there to fetch them in.
        self._pass = [layers * index // passing for index in range(passing)]
        self._stay = {layer: slot for slot, layer in enumerate(sorted(set(range(layers)) - set(self._pass)))}

    def _fetch(self, key: Key, slot: _Slot | None = None) -> None:
        if slot is None:
            slot = self._slots[self._stay[key[1]]] if key[1] in self._stay else self._passed()
        self._forget(slot)
        slot.holds, self._place[key] = key, slot
        slot.arrival = self._store.fetch(key, slot.memory, slot.left, self._copies)

    def _passed(self) -> _Slot:
        """The slots that blocks pass through, in turn."""
        passing = self._slots[len(self._stay) :]
        self._next = (self._next + 1) % len(passing)
        return passing[self._next]

    def _forget(self, slot: _Slot) -> None:
        if slot.holds is not None:
            del self._place[slot.holds]
        slot.holds = slot.arrival = None
