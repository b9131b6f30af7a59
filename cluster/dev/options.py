"""Checks of a cluster's options."""

from __future__ import annotations

import re
import secrets
import shutil
import socket
from collections.abc import Mapping
from typing import Any

import psutil

from cluster.dev.errors import bad_option
from cluster.dev.loopback import free_ports
from cluster.dev.namespaces import missing
from cluster.dev.state import HostSpec, State

MOST_HOSTS = 32  # two digits in the name of a link


def plan(
    nodes: int,
    *,
    name: str,
    cpus: int | Mapping[int, int],
    gpus: int | Mapping[int, int],
    labels: Mapping[int, Mapping[str, str]],
    resources: Mapping[int, Mapping[str, float]],
    redis: str | None,
    dashboard: bool,
    loopback: bool | None,
    object_store_mb: int,
    config: Mapping[str, Any],
    owned: bool,
) -> State:
    """Return the state of a cluster that is still to be made. The options are those of `Cluster`.

    Raises:
        ClusterError: an option cannot work.
    """
    if not re.fullmatch("[a-z][a-z0-9]{0,7}", name):
        raise bad_option("name", name, "1 to 8 small letters and digits, the first a letter")
    if object_store_mb < 80:
        raise bad_option("object_store_mb", object_store_mb, "at least 80, as Ray wants it")
    hosts = _host_specs(nodes, cpus, gpus, labels, resources)
    if loopback is None:
        loopback = bool(missing())
    own_redis = redis == "auto"
    if own_redis and loopback:
        raise bad_option("redis", redis, "HOST:PORT, because `auto` needs network namespaces")
    if own_redis and shutil.which("redis-server") is None:
        raise bad_option("redis", redis, "HOST:PORT, because redis-server is not installed")
    # Hosts with addresses of their own can all have Ray's usual ports.
    port, dashboard_port = free_ports(2) if loopback else (6379, 8265)
    me = psutil.Process()
    return State(
        name=name,
        hosts=hosts,
        token=secrets.token_hex(16),
        loopback=loopback,
        port=port,
        dashboard=dashboard_port if dashboard else 0,
        redis="" if own_redis or redis is None else _redis_address(redis, loopback),
        own_redis=own_redis,
        object_store_mb=object_store_mb,
        config={option: str(value) for option, value in config.items()},
        owner=(me.pid, me.create_time()) if owned else None,
    )


def _host_specs(
    nodes: int,
    cpus: int | Mapping[int, int],
    gpus: int | Mapping[int, int],
    labels: Mapping[int, Mapping[str, str]],
    resources: Mapping[int, Mapping[str, float]],
) -> list[HostSpec]:
    if not 1 <= nodes <= MOST_HOSTS:
        raise bad_option("nodes", nodes, f"1 to {MOST_HOSTS}")
    for option, values in (("cpus", cpus), ("gpus", gpus), ("labels", labels), ("resources", resources)):
        amounts = values if isinstance(values, Mapping) else {0: values}
        for host, amount in amounts.items():
            if host not in range(nodes):
                raise bad_option(option, f"{host}:...", f"a host from 0 to {nodes - 1}")
            if isinstance(amount, int) and amount < 0:
                raise bad_option(option, amount, "0 or more")
    return [
        HostSpec(
            cpus=cpus.get(host, 4) if isinstance(cpus, Mapping) else cpus,
            gpus=gpus.get(host, 0) if isinstance(gpus, Mapping) else gpus,
            labels=dict(labels.get(host, {})),
            resources={name: float(amount) for name, amount in resources.get(host, {}).items()},
        )
        for host in range(nodes)
    ]


def _redis_address(value: str, loopback: bool) -> str:
    """Return the address of a Redis, after a check that it answers and that all hosts can reach it."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit():
        raise bad_option("redis", value, "HOST:PORT or auto")
    try:
        ip = socket.gethostbyname(host)
        socket.create_connection((ip, int(port)), timeout=5).close()
    except OSError as error:
        raise bad_option("redis", value, f"the address of a running Redis ({error})") from None
    if ip.startswith("127.") and not loopback:
        raise bad_option("redis", value, "an address of this machine that hosts can reach, which loopback is not")
    return f"{ip}:{port}"
