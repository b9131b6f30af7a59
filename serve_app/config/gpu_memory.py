"""GPU memory that processes of several stages may take together, if they share a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Taker:
    """A kind of process that takes GPU memory.

    Attributes:
        name: name of the kind.
        gpus: number of GPUs that Ray reserves for one process; less than 1 is a share.
        memory_fraction: share of each GPU's memory that one process may take.
        most: largest number of such processes in the cluster.
        labels: Ray node labels of its hosts.
        devices: number of GPUs that one process uses. If it reserves a share, Ray knows of the first GPU only.
    """

    name: str
    gpus: float
    memory_fraction: float
    most: int
    labels: dict[str, str] = field(default_factory=dict)
    devices: int = 1

    @property
    def per_gpu(self) -> int:
        """Largest number of these processes that Ray places on one GPU."""
        return min(self.most, int(1 / min(self.gpus, 1) + _ROUNDING)) if self.gpus else 0

    def count_guests(self, own: int) -> int:
        """Return how many processes that were placed on a host's other GPUs use this GPU as well.

        Args:
            own: number that was placed on this GPU. Each other GPU is taken to have as many, and at least one.
        """
        if self.devices == 1 or not 0 < self.gpus < 1:
            return 0
        return min(self.most - own, (self.devices - 1) * max(1, own))


def fullest(takers: Sequence[Taker]) -> tuple[float, dict[Taker, int]]:
    """Find the placement by Ray that takes most memory of one GPU.

    Returns:
        The share of the GPU's memory, and the number of processes of each kind.
    """
    found: tuple[float, dict[Taker, int]] = (0.0, {})
    for counts in itertools.product(*(range(one.per_gpu + 1) for one in takers)):
        own = dict(zip(takers, counts, strict=True))
        if sum(min(one.gpus, 1) * count for one, count in own.items()) > 1 + _ROUNDING:
            continue
        there = {one: count + one.count_guests(count) for one, count in own.items()}
        there = {one: count for one, count in there.items() if count}
        if any(_apart(one.labels, other.labels) for one, other in itertools.combinations(there, 2)):
            continue
        taken = sum(one.memory_fraction * count for one, count in there.items())
        if taken > found[0]:
            found = taken, there
    return found


def too_much(takers: Sequence[Taker]) -> str | None:
    """Return the error if the memory of a GPU may not suffice; None if it does."""
    taken, there = fullest(takers)
    if taken <= 1 + _ROUNDING:
        return None
    names = " and ".join(f"{count} x {one.name} ({one.memory_fraction:g})" for one, count in there.items())
    return f"memory_fraction adds up to {taken:g} on a GPU with {names}, which share it by num_gpus, expected at most 1"


def _apart(labels: dict[str, str], others: dict[str, str]) -> bool:
    """Return whether two label selectors surely name different hosts."""
    plain = [
        (labels[key], others[key])
        for key in labels.keys() & others.keys()
        if not any(value.startswith(("!", "in(")) for value in (labels[key], others[key]))
    ]
    return any(one != other for one, other in plain)
