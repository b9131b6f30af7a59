"""Block swap: device memory that the blocks of the experts use in turn, while the others wait in a store.

One mechanism serves both experts that alternate and devices smaller than an expert. Each slot holds the weights of one
block. If there are as many slots as an expert has blocks, each block has its own slot, and a change of expert copies
block by block into them, just ahead of the forward pass. If there are fewer, some blocks are resident and the rest
pass through two slots: one is filled while the other is used.

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
from serve_app.wan.offload.passing import PASSING_SLOTS, no_room_for_blocks
from serve_app.wan.weights.checkpoint import Expert
from serve_app.wan.weights.reader import Weights
from serve_app.wan.weights.shard_spec import ShardSlice

logger = get_logger(__name__)


@dataclass
class _Slot:
    """Device memory of one block.

    Attributes:
        memory: the bytes; `views` are the parameters in them.
        holds: block whose weights are in it, or on their way.
        arrival: returns the event that the weights are there; None once the device has been told to wait for it.
        left: event that the last forward pass through the block is done.
    """

    memory: torch.Tensor
    views: list[torch.Tensor]
    holds: Key | None = None
    arrival: Callable[[], Any] | None = None
    left: Any = None


class BlockSwap:
    """The slots of one rank.

    Args:
        store: keeps the blocks.
        resident_blocks: number of an expert's blocks that stay on the device; None is as many as fit.
        budget_bytes: device memory that all slots may take.
        copies: how blocks are copied to the device; chosen by the kind of device if not given.
    """

    def __init__(
        self,
        device: torch.device,
        store: BlockStore,
        resident_blocks: int | None = None,
        budget_bytes: float = math.inf,
        copies: Copies | None = None,
    ) -> None:
        self._device = device
        self._store = store
        self._resident_blocks = resident_blocks
        self._budget_bytes = budget_bytes
        self._copies: Copies = copies or (StreamCopies(device) if device.type == "cuda" else PlainCopies())
        self._blocks: dict[Key, list[nn.Parameter]] = {}
        self._bound: dict[Key, _Slot] = {}  # the slot that a block's parameters point to
        self._slots: list[_Slot] = []
        self._holder: dict[Key, _Slot] = {}  # the slot that holds a block's weights
        self._resident: dict[int, int] = {}  # the slot of each resident layer
        self._passing: list[int] = []  # the other layers
        self._next = 0
        self._expert: Expert | None = None

    def add_expert(
        self, expert: Expert, blocks: Sequence[nn.Module], slices: Sequence[ShardSlice], weights: Weights
    ) -> None:
        """Put the blocks of an expert under block swap.

        From now on the expert's forward pass has to call `wait_for_block` before each block, and `release_block` after
        it.

        Args:
            expert: name of the expert.
            blocks: the expert's blocks, in order; their parameters are replaced.
            slices: one for each parameter of the blocks, by its name in the expert.
            weights: reader of the slices.

        Raises:
            CheckpointError: the weights are damaged.
            ConfigError: the memory budget is too small for the slots that blocks pass through.
        """
        by_layer = [[part for part in slices if part.name.split(".")[1] == str(layer)] for layer in range(len(blocks))]
        layout = Layout.of_block(by_layer[0])
        if not self._slots:
            self._allocate(layout, len(blocks))
        for layer, (block, of_block) in enumerate(zip(blocks, by_layer, strict=True)):
            key = (expert, layer)
            self._store.add_block(key, layout, of_block, weights)
            slot = self._slots[self._resident.get(layer, len(self._slots) - 1)]
            parameters = []
            for part, view in zip(layout.in_order(of_block), slot.views, strict=True):
                owner, _, leaf = part.name.split(".", 2)[2].rpartition(".")
                parameter = nn.Parameter(view, requires_grad=False)
                setattr(block.get_submodule(owner), leaf, parameter)
                parameters.append(parameter)
            self._blocks[key], self._bound[key] = parameters, slot

    @property
    def device_bytes(self) -> int:
        """Memory of all slots."""
        return sum(slot.memory.nbytes for slot in self._slots)

    def prefetch(self, expert: Expert) -> None:
        """Begin to copy the first blocks of an expert to the device, unless it is the current one.

        The first forward pass then waits for one block at a time.
        """
        if expert == self._expert:
            return
        self._expert = expert
        self._next = 0
        layers = sorted([*self._resident, *self._passing[:PASSING_SLOTS]])
        for layer in layers:
            self._fetch_block((expert, layer))

    def wait_for_block(self, expert: Expert, layer: int) -> None:
        """Have the device wait for a block's weights, and point the block's parameters to them, before it runs.

        Raises:
            CheckpointError: the weights are damaged.
        """
        key = (expert, layer)
        if key not in self._holder:
            self._fetch_block(key)
        slot = self._holder[key]
        if slot.arrival is not None:
            try:
                event = slot.arrival()
            except BaseException:  # the weights did not come: the next pass fetches them again
                self._empty(slot)
                raise
            self._copies.wait(event)
            slot.arrival = None
        if self._bound[key] is not slot:
            for parameter, view in zip(self._blocks[key], slot.views, strict=True):
                parameter.data = view
            self._bound[key] = slot

    def release_block(self, expert: Expert, layer: int) -> None:
        """Begin to fill a block's slot with the block that passes through it next, after the block has run."""
        slot = self._holder[expert, layer]
        slot.left = self._copies.done()
        if layer in self._passing:
            following = self._passing[(self._passing.index(layer) + PASSING_SLOTS) % len(self._passing)]
            if (expert, following) not in self._holder:
                self._fetch_block((expert, following), slot)

    def _allocate(self, layout: Layout, layers: int) -> None:
        budget = self._budget_bytes
        fit = layers if budget >= layers * layout.nbytes else int(budget // layout.nbytes)
        count = min(layers, fit if self._resident_blocks is None else self._resident_blocks + PASSING_SLOTS)
        if count < min(layers, PASSING_SLOTS):
            raise ConfigError(no_room_for_blocks(budget, layout.nbytes))
        resident = count if count == layers else count - PASSING_SLOTS
        for _ in range(count):
            memory = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
            self._slots.append(_Slot(memory, layout.views(memory)))
        passing = layers - resident
        logger.info(
            "block swap", extra={"layers": layers, "resident": resident, "mib_each": round(layout.nbytes / 2**20, 1)}
        )
        # Spread evenly among the resident layers, so that the time of those is there to copy the others.
        self._passing = [layers * index // passing for index in range(passing)]
        self._resident = {layer: slot for slot, layer in enumerate(sorted(set(range(layers)) - set(self._passing)))}

    def _fetch_block(self, key: Key, slot: _Slot | None = None) -> None:
        if slot is None:
            slot = self._slots[self._resident[key[1]]] if key[1] in self._resident else self._next_passing_slot()
        self._empty(slot)
        slot.holds, self._holder[key] = key, slot
        slot.arrival = self._store.begin_copy(key, slot.memory, slot.left, self._copies)

    def _next_passing_slot(self) -> _Slot:
        passing = self._slots[len(self._resident) :]
        self._next = (self._next + 1) % len(passing)
        return passing[self._next]

    def _empty(self, slot: _Slot) -> None:
        if slot.holds is not None:
            del self._holder[slot.holds]
        slot.holds = slot.arrival = None
