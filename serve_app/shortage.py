"""What a Ray cluster lacks of what deployments ask for."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from serve_app.capacity import Host, Need, impossible
from serve_app.errors import ConfigError

# On nodes that Kubernetes or Ray's cluster launcher has started; then more may come.
_NODE_GROUP = "ray.io/node-group"


def hosts() -> list[Host]:
    """Return the hosts of the Ray cluster that are alive."""
    return [Host(node["Resources"], node.get("Labels") or {}) for node in ray.nodes() if node["Alive"]]


def shortages(wanted: Sequence[Need]) -> list[str]:
    """Return a line for each thing that the cluster could never give; none of one that may grow."""
    there = hosts()
    return [] if any(host.labels.get(_NODE_GROUP) for host in there) else impossible(wanted, there)


def refuse_the_impossible(wanted: Sequence[Need]) -> None:
    """Refuse what the cluster could never give, unless it may grow.

    Raises:
        ConfigError: a line for each thing that is too much, with what the cluster has.
    """
    if lines := shortages(wanted):
        raise ConfigError("\n".join(lines))
