"""The description of a cluster, in a file that other shells read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from cluster.dev.errors import ClusterError
from cluster.dev.namespaces import PREFIX

# Always /tmp: Ray puts sockets into it, whose paths may have 107 characters, and `down` looks from any environment.
_ROOT = Path("/tmp")


@dataclass(frozen=True)
class HostSpec:
    """The resources and labels that a host declares to Ray."""

    cpus: int = 4
    gpus: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """The description of a cluster: all that is needed to start, find and end its processes.

    Attributes:
        name: the cluster's name.
        hosts: one entry for each host; host 0 is the head.
        token: Ray's authentication token.
        loopback: True if hosts are no namespaces.
        port: the port of host 0 on which the control process listens.
        dashboard: the dashboard's port; 0 if there is none.
        redis: HOST:PORT, empty if there is none.
        own_redis: True if the Redis runs inside the cluster.
        object_store_mb: size of Ray's object store on each host, in MB.
        config: Ray's internal options (`RAY_<name>` in the environment), the same on all hosts.
        owner: pid and start time of the process that takes the cluster down when it ends; None if there is none.
    """

    name: str
    hosts: list[HostSpec]
    token: str
    loopback: bool
    port: int
    dashboard: int
    redis: str
    own_redis: bool
    object_store_mb: int
    config: dict[str, str]
    owner: tuple[int, float] | None

    @property
    def folder(self) -> Path:
        """The folder of all files that the cluster writes."""
        return folder(self.name)

    def save(self) -> None:
        """Write the file. Only its owner can read it, since it holds the token."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        write_private(self.folder / "state.json", json.dumps(asdict(self), indent=1))

    @property
    def abandoned(self) -> bool:
        """True if the process that should have taken the cluster down is gone."""
        if self.owner is None:
            return False
        pid, started = self.owner
        try:
            return psutil.Process(pid).create_time() != started
        except psutil.NoSuchProcess:
            return True


def folder(name: str) -> Path:
    """Return the folder of the cluster of that name."""
    return _ROOT / f"{PREFIX}{name}"


def load(name: str) -> State:
    """Read the state of the cluster of that name, up or left behind.

    Raises:
        ClusterError: there is none.
    """
    try:
        content = json.loads((folder(name) / "state.json").read_text())
    except (OSError, ValueError):
        there = ", ".join(sorted(names())) or "none is"
        raise ClusterError(f"--name has value {name!r}, expected a cluster that is up: {there}") from None
    content["hosts"] = [HostSpec(**host) for host in content["hosts"]]
    content["owner"] = content["owner"] and tuple(content["owner"])
    return State(**content)


def names() -> Iterator[str]:
    """Return the names of all clusters with a state file."""
    return (path.parent.name.removeprefix(PREFIX) for path in _ROOT.glob(f"{PREFIX}*/state.json"))


def remove(name: str) -> None:
    """Delete a cluster's folder, if there is one."""
    if folder(name).exists():
        shutil.rmtree(folder(name))


def write_private(path: Path, content: str) -> None:
    """Write a file whole or not at all. Only its owner can read it."""
    draft = path.with_suffix(".new")
    draft.touch(mode=0o600)
    draft.write_text(content)
    draft.replace(path)
