"""Clusters of several hosts on this machine, for tests of what happens between hosts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.dev import Cluster
from cluster.dev.namespaces import missing
from cluster.dev.teardown import abandoned, take_down
from tests.support.serving import QUICK, Serving


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip if hosts cannot be network namespaces; fail then in continuous integration."""
    _need(not (why := missing()), f"network namespaces: {why}")
    for name in abandoned():  # by a run that was killed
        take_down(name)


@pytest.fixture(scope="session")
def redis_server() -> None:
    """Skip if there is no program redis-server; fail then in continuous integration."""
    _need(shutil.which("redis-server") is not None, "redis-server")


def _need(there: bool, what: str) -> None:
    if not there:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"this machine lacks {what}")


@pytest.fixture(scope="module")
def three_hosts(namespaces: None, redis_server: None) -> Iterator[Cluster]:
    """A head and two hosts that differ. A test that breaks one repairs it with `join`.

    Host 1 has a GPU, the label `pool: denoise` and 8 of the resource `denoise`; host 2 two GPUs, and the same with
    `codec`. Dead hosts are found within seconds, and a Redis outside of the hosts keeps what the control process knows.
    """
    with Cluster(
        3,
        cpus=8,
        gpus={1: 1, 2: 2},
        labels={1: {"pool": "denoise"}, 2: {"pool": "codec"}},
        resources={1: {"denoise": 8}, 2: {"codec": 8}},
        redis="auto",
        config=QUICK,
        say=print,
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def serve_on(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Serving]]:
    """Return a function that runs `serve run` on a cluster until the module ends: `serve_on(cluster, denoiser={...})`.

    The options, by section, change those of configs/tiny.yaml; the model is the random checkpoint.
    """
    running: list[Serving] = []

    def start(cluster: Cluster, **changes: dict[str, Any]) -> Serving:
        running.append(Serving(cluster, tmp_path_factory.mktemp("serving"), checkpoint, changes))
        running[-1].wait_ready()
        return running[-1]

    yield start
    for serving in running:
        serving.stop()
