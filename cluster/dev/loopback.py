"""The fallback without namespaces: Ray nodes that share this machine's address, each with its own ports."""

from __future__ import annotations

import socket
from typing import NoReturn

import psutil

from cluster.dev.errors import ClusterError

MARK = "RAY_DEV_CLUSTER"
"""An environment variable with the value NAME/HOST. Every process of a cluster inherits it, and is found by it."""


class Loopback:
    """Hosts in name only, with the same methods as `Namespaces`.

    Args:
        name: the cluster's name.
    """

    limits = (
        "hosts are Ray nodes on one address: `cut` does nothing here, `kill` spares processes that Ray did not start, "
        "and nothing is tested about addresses"
    )

    def __init__(self, name: str) -> None:
        self.name = name

    @staticmethod
    def clusters() -> set[str]:
        """Return the names of clusters that have left anything on this machine."""
        return {mark.split("/")[0] for _, mark in _marked()}

    def create(self, hosts: list[str]) -> None:
        """Do nothing: there is nothing to make."""

    def ip(self, host: str) -> str:
        """Return the address of this machine that Ray uses: it replaces 127.0.0.1 by another one."""
        from ray.util import get_node_ip_address

        return str(get_node_ip_address())

    def command(self, host: str, argv: list[str]) -> list[str]:
        """Return `argv` unchanged."""
        return argv

    def pids(self, host: str) -> list[int]:
        """Return every process of a host's Ray node."""
        return [pid for pid, mark in _marked() if mark == f"{self.name}/{host}"]

    def all_pids(self) -> list[int]:
        """Return every process of the cluster."""
        return [pid for pid, mark in _marked() if mark.startswith(f"{self.name}/")]

    def set_link(self, host: str, up: bool) -> None:
        """Refuse to take a link down; there is none."""
        if not up:
            self._refuse(host)

    def is_cut(self, host: str) -> bool:
        """Return False: a host on loopback is never cut."""
        return False

    def remove(self) -> None:
        """Do nothing: nothing was made."""

    def _refuse(self, host: str) -> NoReturn:
        raise ClusterError(f"host {host} cannot be cut: this cluster runs on loopback, expected one of namespaces")


def free_ports(count: int) -> list[int]:
    """Return different ports that nobody listens on right now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _marked() -> list[tuple[int, str]]:
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK)
        except psutil.Error:  # it ended meanwhile, or belongs to somebody else
            continue
        if mark:
            found.append((process.pid, mark))
    return found
