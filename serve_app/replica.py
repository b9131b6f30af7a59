"""Questions of every deployment at its start: which Ray actor this is, and which cluster it runs in.

Imports neither jobs nor the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from serve_app.config import Config
from serve_app.errors import ConfigError
from serve_app.logs import get_logger

logger = get_logger(__name__)


def this_process() -> Any:
    """Return a handle of the actor that runs this code, to hand to actors that it calls; None outside of an actor."""
    if not ray.is_initialized():  # asking for a context would start a Ray
        return None
    try:
        return ray.get_runtime_context().current_actor
    except RuntimeError:
        return None


def alive_hosts() -> int:
    """Return how many hosts the Ray cluster has now."""
    return sum(node["Alive"] for node in ray.nodes())


def check_hosts(config: Config, hosts: int) -> None:
    """Check that the job store can serve a cluster of several hosts.

    Args:
        config: the deployment's configuration.
        hosts: how many the cluster has.

    Raises:
        ConfigError: the store is a file that the other hosts cannot read.
    """
    if hosts > 1 and not config.store.shared_disk and config.store_url.startswith("sqlite"):
        raise ConfigError(
            f"store.url has value {config.store_url!r}, expected PostgreSQL: SQLite serves one host, and this cluster "
            f"has {hosts} (store.shared_disk: true where all of them see the same local disk)"
        )


@contextmanager
def starting() -> Iterator[None]:
    """Log a ConfigError of a replica's constructor as one line.

    Serve prints an exception of a constructor with all its causes, a hundred lines for each try, in which the line that
    helps is hard to find.
    """
    try:
        yield
    except ConfigError as error:
        logger.error("cannot start", extra={"error": str(error)})
        raise ConfigError(str(error)) from None
