"""Resources that deployments need and a Ray cluster lacks."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from serve_app.capacity import Host, Need, impossible
from serve_app.errors import ConfigError

# Label of nodes that Kubernetes or Ray's cluster launcher started; a cluster with such nodes may grow.
_NODE_GROUP = "ray.io/node-group"


def hosts() -> list[Host]:
    """Return the hosts of the Ray cluster that are alive."""
    return [Host(node["Resources"], node.get("Labels") or {}) for node in ray.nodes() if node["Alive"]]


def shortages(wanted: Sequence[Need]) -> list[str]:
    """Return a line for each need that the cluster could never meet; none if the cluster may grow."""
    there = hosts()
    return [] if any(host.labels.get(_NODE_GROUP) for host in there) else impossible(wanted, there)


def refuse_the_impossible(wanted: Sequence[Need]) -> None:
    """Check that the cluster could meet all needs, or may grow.

    Raises:
        ConfigError: a line for each need that is too large, with what the cluster has.
    """
    if lines := shortages(wanted):
        raise ConfigError("\n".join(lines))
