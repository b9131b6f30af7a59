"""Hosts that are network namespaces, joined by a bridge that has an address of this machine."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import re
import shutil
import socket
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.dev.errors import ClusterError

# Begins the name of every namespace, link and folder. A cluster's name of 8 characters and "-31" make it 14 of the 15
# characters that the kernel allows for a link.
PREFIX = "rc-"
REDIS = "r"  # the key of the host that runs a Redis of the cluster's own
_NETNS_ETC = Path("/etc/netns")


def missing() -> str:
    """Return why this machine cannot have network namespaces, or an empty string if it can."""
    if shutil.which("ip") is None:
        return "iproute2 (the command `ip`) is not installed"
    if os.geteuid() != 0:
        return "not root"
    probe = f"{PREFIX}probe{os.getpid()}"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "del", probe)
    except ClusterError as error:
        return str(error)
    return ""


class Namespaces:
    """The network of one cluster. Everything is found by the cluster's name, so that nothing has to be remembered.

    Args:
        name: the cluster's name.
    """

    limits = ""
    """A sentence on what cannot be tested with this kind of host."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._bridge = f"{PREFIX}{name}"

    @staticmethod
    def clusters() -> set[str]:
        """Return the names of clusters that have left anything on this machine."""
        entries = [*_namespaces(), *(link["ifname"] for link in _ip_json("link", "show", "type", "bridge"))]
        return {entry.removeprefix(PREFIX).split("-")[0] for entry in entries if entry.startswith(PREFIX)}

    def create(self, hosts: list[str]) -> None:
        """Make the bridge and the hosts, without processes."""
        with _locked():  # two clusters must not take the same addresses
            network = _free_network(self.name)
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("address", "add", f"{network[1]}/{network.prefixlen}", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for host in hosts:
            self._create_host(host)

    def _create_host(self, host: str) -> None:
        name, address = self._host(host), self.ip(host)
        etc = _NETNS_ETC / name  # `ip netns exec` mounts its files over /etc
        etc.mkdir(parents=True)
        # The machine's name has to resolve to the host's own address: gloo and others listen on that.
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
        (etc / "resolv.conf").write_text("")  # no name server answers from here; asking one would take seconds to fail
        _ip("netns", "add", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", name, "master", self._bridge, "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")
        # The route leads nowhere, but Ray takes the address from which a host would reach the internet.
        _ip("-n", name, "route", "add", "default", "via", self.ip(""))

    def ip(self, host: str) -> str:
        """Return the address of a host, or that of this machine on the bridge for an empty name."""
        for link in _ip_json("address", "show", "dev", self._bridge):
            for entry in link["addr_info"]:
                if entry["family"] == "inet":
                    base = ipaddress.IPv4Address(entry["local"])
                    return str(base if host == "" else base + 1 if host == REDIS else base + 9 + int(host))
        raise ClusterError(f"the bridge {self._bridge} has no address")

    def command(self, host: str, argv: list[str]) -> list[str]:
        """Return the command line that runs `argv` inside a host."""
        return ["ip", "netns", "exec", self._host(host), *argv]

    def pids(self, host: str) -> list[int]:
        """Return every process inside a host."""
        if self._host(host) not in _namespaces():
            return []
        return [int(pid) for pid in _ip("netns", "pids", self._host(host)).split()]

    def all_pids(self) -> list[int]:
        """Return every process inside any host of the cluster."""
        return [pid for name in self._hosts() for pid in self.pids(name.removeprefix(f"{self._bridge}-"))]

    def set_link(self, host: str, up: bool) -> None:
        """Put a host's link up or down on the bridge's side: the host sees a lost carrier, as of a pulled cable."""
        _ip("link", "set", self._host(host), "up" if up else "down")

    def is_cut(self, host: str) -> bool:
        """Return True if the host's link is down."""
        return all("UP" not in link["flags"] for link in _ip_json("link", "show", "dev", self._host(host)))

    def remove(self) -> None:
        """Remove namespaces and links, also after an interrupted `create`. Their processes must be dead."""
        links = {link["ifname"] for link in _ip_json("link", "show")}
        for name in [*(link for link in links if link.startswith(f"{self._bridge}-")), self._bridge]:
            if name in links:
                _ip("link", "del", name)  # explicitly: with its namespace a link goes only some time later
        for name in self._hosts():
            _ip("netns", "del", name)
        for etc in _NETNS_ETC.glob(f"{self._bridge}-*"):
            shutil.rmtree(etc)

    def _host(self, host: str) -> str:
        return f"{self._bridge}-{host}"

    def _hosts(self) -> list[str]:
        return [name for name in _namespaces() if name.startswith(f"{self._bridge}-")]


def _free_network(name: str) -> ipaddress.IPv4Network:
    """Return a /24 of 10.192.0.0/10 that nothing on this machine uses. A name tends to get the same one again."""
    taken = [
        ipaddress.IPv4Network(f"{entry['local']}/{entry['prefixlen']}", strict=False)
        for link in _ip_json("-4", "address", "show")
        for entry in link["addr_info"]
    ]
    for route in _ip_json("-4", "route", "show"):
        if route["dst"] != "default":
            taken.append(ipaddress.IPv4Network(route["dst"], strict=False))
    start = zlib.crc32(name.encode())
    for step in range(1 << 14):
        number = (start + step) % (1 << 14)
        network = ipaddress.IPv4Network(((10 << 24) + (192 << 16) + (number << 8), 24))
        if not any(network.overlaps(other) for other in taken):
            return network
    raise ClusterError("no free network in 10.192.0.0/10")


@contextmanager
def _locked() -> Iterator[None]:
    _NETNS_ETC.mkdir(exist_ok=True)
    lock = os.open(_NETNS_ETC, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _namespaces() -> list[str]:
    return re.findall(r"^\S+", _ip("netns", "list"), re.MULTILINE)


def _ip_json(*arguments: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(_ip("-j", *arguments) or "[]")
    return [entry for entry in entries if entry]  # `ip` gives an empty object for each entry that it filtered out


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout
