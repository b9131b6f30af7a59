"""The hosts as the control process sees them. A program of its own asks: a process can have one token only."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]
_PROGRAM = "from cluster.dev.view import main; main()"


@dataclass(frozen=True)
class RayNode:
    """A Ray node that is or was part of the cluster. A host that came back has had several."""

    host: int
    ip: str
    alive: bool
    reason: str
    """The reason of its death; empty if it is alive."""
    resources: dict[str, float]
    labels: dict[str, str]
    node_id: str


def read(address: str, timeout_s: float) -> list[RayNode]:
    """Ask the control process at `address` for its nodes. RAY_AUTH_TOKEN must be set.

    Raises:
        Exception: whatever Ray raises if nobody answers.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=timeout_s).close()  # if nobody listens, Ray tries for 40 s
    # Ray's public calls need a living Ray node on this machine, or the dashboard; this one only the control process.
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    nodes = GcsClient(address=address).get_all_node_info(timeout=timeout_s).values()
    return [
        RayNode(
            host=int(node.node_name),
            ip=node.node_manager_address,
            alive=node.state == GcsNodeInfo.GcsNodeState.ALIVE,
            reason=node.death_info.reason_message,
            resources=dict(node.resources_total),
            labels=dict(node.labels),
            node_id=node.node_id.hex(),
        )
        for node in nodes
    ]


def ask(
    address: str, environment: Mapping[str, str], timeout_s: float, alive: Collection[int] | None
) -> tuple[list[RayNode] | None, str]:
    """Return the nodes that the control process knows, or None and the reason.

    Args:
        address: host:port of the control process.
        environment: holds the token.
        timeout_s: give up after this time.
        alive: wait until exactly these hosts are alive; None does not wait.
    """
    argv = [sys.executable, "-c", _PROGRAM, address, str(timeout_s)]
    argv += [] if alive is None else [",".join(str(host) for host in alive)]
    try:
        done = subprocess.run(
            argv, env=environment, cwd=_REPOSITORY, capture_output=True, text=True, timeout=timeout_s + 10
        )
    except subprocess.TimeoutExpired:  # Ray's client does not always keep to its own limit
        return None, "no answer"
    if done.returncode:
        return None, done.stderr.strip().rpartition("\n")[2]
    return [RayNode(**node) for node in json.loads(done.stdout)], ""


def main() -> None:
    """Print the nodes as JSON, once exactly HOSTS are alive if given: the program that `ask` runs.

    Its arguments are ADDRESS TIMEOUT [HOSTS], HOSTS being like `0,2`. The status is 1 if the time is up.
    """
    address, timeout_s = sys.argv[1], float(sys.argv[2])
    wanted = {int(host) for host in sys.argv[3].split(",")} if len(sys.argv) > 3 else None
    deadline = time.monotonic() + timeout_s
    while True:
        left = deadline - time.monotonic()
        nodes: list[RayNode] | None
        try:
            nodes = read(address, max(min(left, 5), 0.5))
        except Exception as error:
            nodes, problem = None, f"{type(error).__name__}: {error}".splitlines()[0]
        if nodes is not None and wanted in (None, {node.host for node in nodes if node.alive}):
            print(json.dumps([asdict(node) for node in nodes]))
            return
        if left <= 0:
            alive = problem if nodes is None else sorted(node.host for node in nodes if node.alive)
            print(alive, file=sys.stderr)
            sys.exit(1)
        time.sleep(0.1)
