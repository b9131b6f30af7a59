"""Ways to hurt a cluster that serves: what `benchmarks.faults.chaos` does at random and `tests/cluster` one by one."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from cluster.dev import Cluster

CUT_S = 20.0
"""Seconds that a link is down."""


def find(cluster: Cluster, title: str) -> list[tuple[int, int]]:
    """Return host and process id of Ray's processes whose title begins so."""
    found = []
    for host in cluster.nodes:
        for pid in host.pids():
            try:
                if (psutil.Process(pid).cmdline() or [""])[0].startswith(f"ray::{title}"):
                    found.append((host.index, pid))
            except psutil.NoSuchProcess:
                continue
    return found


@dataclass(frozen=True)
class Fault:
    """A blow, and what an operator does about it later, if anything. Both return what they hit."""

    strike: Callable[[Cluster, random.Random], Any]
    mend: Callable[[Cluster, Any], None] | None = None
    after_s: float = 0.0
    """Seconds from the blow until it is mended."""


def _signal(title: str, what: int) -> Fault:
    def strike(cluster: Cluster, rng: random.Random) -> str:
        host, pid = rng.choice(sorted(find(cluster, title)))
        os.kill(pid, what)
        return f"{title} {pid} on host {host}"

    return Fault(strike)


def _ranks_host(cluster: Cluster, rng: random.Random) -> int:
    return rng.choice(sorted({host for host, _ in find(cluster, "Rank") if host}))


def _kill_host(cluster: Cluster, rng: random.Random) -> int:
    host = _ranks_host(cluster, rng)
    cluster.kill(host)
    return host


def _cut(cluster: Cluster, rng: random.Random) -> int:
    host = _ranks_host(cluster, rng)
    cluster.cut(host)
    return host


def _kill_control(cluster: Cluster, rng: random.Random) -> int:
    cluster.kill_control()
    return 0


def _join(cluster: Cluster, host: int) -> None:
    cluster.join(host)


FAULTS: dict[str, Fault] = {
    "rank killed": _signal("Rank", signal.SIGKILL),
    "rank hung": _signal("Rank", signal.SIGSTOP),
    "coordinator killed": _signal("ServeReplica:wan:Denoiser", signal.SIGKILL),
    "pipeline killed": _signal("ServeReplica:wan:Pipeline", signal.SIGKILL),
    "dispatcher killed": _signal("ServeReplica:gateway:dispatcher", signal.SIGKILL),
    "encoder killed": _signal("ServeReplica:wan:Encoder", signal.SIGKILL),
    "decoder killed": _signal("ServeReplica:wan:Decoder", signal.SIGKILL),
    "host of ranks killed": Fault(_kill_host, _join, 5.0),
    "link of ranks' host down": Fault(_cut, _join, CUT_S),
    "control process killed": Fault(_kill_control, _join, 3.0),
}


def strike(name: str, cluster: Cluster, rng: random.Random, timeout_s: float = 120) -> Any:
    """Strike as soon as there is something to hit: it may be coming back from the last blow."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return FAULTS[name].strike(cluster, rng)
        except (IndexError, ProcessLookupError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
