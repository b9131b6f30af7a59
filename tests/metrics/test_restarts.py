"""Series of processes that have ended go away, so that a hundred restarts of a replica leave nothing behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

ray = pytest.importorskip("ray")

RESTARTS = 100
AT_ONCE = 10


class Replica:
    """A process that records what a coordinator records."""

    def record(self) -> None:
        from serve_app.metrics import catalog as metrics
        from serve_app.metrics import export

        export.start("coordinator")
        for size in metrics.SIZES:
            metrics.step_seconds.observe(1.0, size=size, expert="high_noise")
        metrics.resident_samples.set(1)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The metrics of a Ray that reports every five seconds."""
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "5000")
    ray.init(address="local", num_cpus=AT_ONCE, include_dashboard=False, log_to_driver=False)
    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def series(endpoint: str) -> list[str]:
    lines = httpx.get(endpoint, timeout=30).text.splitlines()
    return [line for line in lines if line.startswith("ray_wan_")]


def until(condition: Any, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.slow
def test_restarts_leave_no_series(endpoint: str) -> None:
    actor = ray.remote(num_cpus=1)(Replica)
    most = one = 0
    for _ in range(RESTARTS // AT_ONCE):
        replicas = [actor.remote() for _ in range(AT_ONCE)]
        ray.get([replica.record.remote() for replica in replicas])
        until(lambda: series(endpoint))
        for replica in replicas:
            ray.kill(replica)
        found = series(endpoint)
        most = max(most, len(found))
        one = max(one, len(found) // len({line.partition('WorkerId="')[2][:16] for line in found}))
    # At most those of this round and of two reports before it.
    assert most <= 4 * AT_ONCE * one
    until(lambda: not series(endpoint))
