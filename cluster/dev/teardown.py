"""The end of clusters, found by their name: whoever brought them up, and however far that came."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from cluster.dev import state
from cluster.dev.errors import ClusterError
from cluster.dev.loopback import Loopback
from cluster.dev.namespaces import Namespaces
from cluster.dev.processes import kill_all, storage_namespace
from cluster.dev.state import State

_FORGET = """
import sys
from ray._private.gcs_utils import cleanup_redis_storage
cleanup_redis_storage(sys.argv[1], int(sys.argv[2]), "", False, sys.argv[3])
"""


def network_of(cluster: State) -> Namespaces | Loopback:
    """Return the network of a cluster."""
    return Loopback(cluster.name) if cluster.loopback else Namespaces(cluster.name)


def is_up(name: str) -> bool:
    """Return True if a cluster of that name runs and has not been abandoned."""
    try:
        found = state.load(name)
    except ClusterError:
        return False
    return not found.abandoned if found.owner else bool(network_of(found).all_pids())


def take_down(name: str) -> int:
    """Kill all processes of a cluster and remove its hosts, links and folder.

    Returns:
        The number of processes killed.
    """
    killed = 0
    for network in _networks(name):
        killed += kill_all(network.all_pids)
        network.remove()
    try:
        found = state.load(name)
    except ClusterError:
        found = None
    if found is not None and found.redis and not found.own_redis:
        host, _, port = found.redis.rpartition(":")
        # Done by a process of its own: this one need not have Ray, nor end when Ray's client finds no Redis.
        subprocess.run([sys.executable, "-c", _FORGET, host, port, storage_namespace(found)], capture_output=True)
    state.remove(name)
    return killed


def leftovers() -> list[str]:
    """Return the names of all clusters that this machine has anything of, up or left behind."""
    found = set(state.names()) | Loopback.clusters()
    return sorted(found | (Namespaces.clusters() if _has_namespaces() else set()))


def abandoned() -> list[str]:
    """Return the names of clusters whose owner ended without taking them down."""
    found = []
    for name in state.names():
        try:
            if state.load(name).abandoned:
                found.append(name)
        except ClusterError:  # it was just taken down
            continue
    return found


def _networks(name: str) -> list[Namespaces | Loopback]:
    return [*([Namespaces(name)] if _has_namespaces() else []), Loopback(name)]


def _has_namespaces() -> bool:
    return os.geteuid() == 0 and shutil.which("ip") is not None
