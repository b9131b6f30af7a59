"""Number of equal nodes that replicas need, by placing them as Ray would: the largest first, each where it fits.

Knows no Kubernetes. Ray may place them in another order, so one node more can be needed where many sizes are mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from serve_app.capacity import Amounts, Need

_ROUNDING = 1e-6


@dataclass
class _Node:
    """The part of a node that is still free."""

    cpus: float
    gpus: list[float] = field(default_factory=list)

    def take(self, bundle: Amounts) -> bool:
        """Reserve a bundle, and return whether it fitted. A share of a GPU comes from the fullest one that has it."""
        cpus, gpus = bundle.get("CPU", 0), bundle.get("GPU", 0)
        if cpus > self.cpus + _ROUNDING:
            return False
        if gpus >= 1:
            chosen = [number for number, free in enumerate(self.gpus) if free >= 1 - _ROUNDING][: round(gpus)]
            if len(chosen) < gpus:
                return False
            for number in chosen:
                self.gpus[number] = 0
        elif gpus:
            fitting = [number for number, free in enumerate(self.gpus) if free + _ROUNDING >= gpus]
            if not fitting:
                return False
            self.gpus[min(fitting, key=lambda number: self.gpus[number])] -= gpus
        self.cpus -= cpus
        return True


@dataclass(frozen=True)
class Packed:
    """Nodes that were filled: their number, and the CPUs that are reserved on the fullest of them."""

    nodes: int
    cpus: float


def pack(needs: Sequence[Need], cpus: float, gpus: int) -> Packed:
    """Place all replicas of some needs on nodes of one size.

    Args:
        needs: what the deployments need; each bundle fits on an empty node.
        cpus: CPUs of a node.
        gpus: GPUs of a node.

    Raises:
        ValueError: a replica does not fit on empty nodes.
    """
    nodes: list[_Node] = []

    def place(bundles: Sequence[Amounts]) -> bool:
        """Place bundles together on one node, a new one if need be."""
        for number, node in enumerate([*nodes, _Node(cpus, [1.0] * gpus)]):
            trial = deepcopy(node)
            if all(trial.take(bundle) for bundle in bundles):
                nodes[number : number + 1] = [trial]
                return True
        return False

    for need in sorted(needs, key=_weight, reverse=True):
        for _ in range(need.replicas):
            bundles = sorted(need.bundles, key=lambda bundle: bundle.get("GPU", 0), reverse=True)
            together = need.strategy == "STRICT_PACK"
            if not (place(bundles) if together else all(place([bundle]) for bundle in bundles)):
                raise ValueError(f"{need.option} asks for {need}, which no empty node has")
    if any(need.strategy == "STRICT_SPREAD" for need in needs):
        most = max(len(need.bundles) for need in needs if need.strategy == "STRICT_SPREAD")
        nodes += [_Node(cpus, [1.0] * gpus)] * (most - len(nodes))
    return Packed(len(nodes), max((cpus - node.cpus for node in nodes), default=0))


def _weight(need: Need) -> tuple[float, float]:
    total: Mapping[str, float] = need.total
    return total.get("GPU", 0), total.get("CPU", 0)
