"""A host of a cluster, as this machine sees it."""

from __future__ import annotations

from cluster.dev.loopback import Loopback
from cluster.dev.namespaces import Namespaces
from cluster.dev.processes import raylet
from cluster.dev.state import HostSpec


class Host:
    """One host of a cluster."""

    def __init__(self, network: Namespaces | Loopback, index: int, spec: HostSpec) -> None:
        self._network = network
        self.index = index
        self.spec = spec

    @property
    def ip(self) -> str:
        """The host's own address."""
        return self._network.ip(str(self.index))

    def pids(self) -> list[int]:
        """Return every process of the host, whoever started it."""
        return self._network.pids(str(self.index))

    @property
    def is_cut(self) -> bool:
        """True if the host's link is down."""
        return self._network.is_cut(str(self.index))

    @property
    def runs_ray(self) -> bool:
        """True if the host's Ray node runs. It may still count as dead for the control process."""
        return raylet(self.pids()) is not None
