"""Costs of metrics: what a step, a request and a job record, and what a process exports every few seconds.

    python -m benchmarks.serving.metrics_cost [--rounds 5]

Recording is timed by itself, without the step or the request around it. Exporting is timed on a real Ray, with every
metric of a kind of process in use. All times are of the processor, and shares are of the time between two exports.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from itertools import product
from typing import Any, get_args

from benchmarks.machine import describe
from serve_app.engine.passes import _measure
from serve_app.engine.scheduler import Entry
from serve_app.gateway.http.measure import Measured
from serve_app.metrics import catalog as metrics
from serve_app.metrics.export import PERIOD_S, Exporter
from serve_app.metrics.metric import Counter, Gauge, Histogram, Metric, Process

_CALLS = 20_000
# Combinations of label values of a metric that a process comes to use: more than a tiny deployment does in its tests.
_USED = 24


def per_call(call: Callable[[], object], rounds: int) -> float:
    """Return the seconds of a call: the median of some rounds."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(_CALLS):
            call()
        times.append((time.process_time() - began) / _CALLS)
    return statistics.median(times)


def step() -> Callable[[], object]:
    """Return what the engine records of a step of eight samples."""
    entries = [Entry(str(index), (9, 60, 104), True, 14040, 40, 20, work=1e15) for index in range(8)]

    def record() -> None:
        metrics.parked_samples.set(0)
        _measure(entries, 2.0)
        metrics.step_overhead_seconds.inc(0.001)

    return record


def request(rounds: int) -> float:
    """Return the seconds that the middleware adds to a request."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ignore(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/v1/videos/video_0123", "root_path": ""}

    async def seconds(app: Any) -> float:
        began = time.process_time()
        for _ in range(_CALLS):
            await app(scope, None, ignore)
        return (time.process_time() - began) / _CALLS

    async def both() -> float:
        return await seconds(Measured(answer)) - await seconds(answer)

    return statistics.median(asyncio.run(both()) for _ in range(rounds))


def job() -> None:
    """Record what a job does beside its requests and steps."""
    metrics.jobs_created.inc(priority="standard", size="480p")
    metrics.job_wait_seconds.observe(3.0, priority="standard")
    metrics.job_run_seconds.observe(60.0, size="480p")
    for stage in metrics.STAGES:
        metrics.stage_seconds.observe(2.0, stage=stage, size="480p")
    metrics.gpu_seconds.inc(40.0)
    metrics.jobs_ended.inc(reason="completed", priority="standard")


def fill(metric: Metric) -> None:
    """Use a metric with many of its label values."""
    for values in list(product(*metric.labels.values()))[:_USED]:
        labels = dict(zip(metric.labels, values, strict=True))
        match metric:
            case Counter():
                metric.inc(1.5, **labels)
            case Gauge():
                metric.set(1.5, **labels)
            case Histogram():
                metric.observe(1.5, **labels)


def exports(rounds: int) -> dict[str, tuple[int, float]]:
    """Return, for each kind of process, how many numbers it exports, and the seconds that this takes."""
    import ray
    from ray.util.metrics import Gauge as RaysGauge

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    found = {}
    for process in get_args(Process):
        own = tuple(metric for metric in metrics.METRICS if process in metric.by)
        for metric in own:
            metric.begin()
            fill(metric)
        exporter = Exporter(own, RaysGauge)
        count, times = exporter.export(), []
        for _ in range(4 * rounds):
            began = time.thread_time()
            exporter.export()
            times.append(time.thread_time() - began)
        found[process] = count, statistics.median(times)
    ray.shutdown()
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(describe())
    print("\n| recorded by | µs |\n|---|---|")
    print(f"| a step of 8 samples | {per_call(step(), rounds) * 1e6:.1f} |")
    print(f"| a request | {request(rounds) * 1e6:.1f} |")
    print(f"| a job beside these | {per_call(job, rounds) * 1e6:.1f} |")
    print(f"\n| a process exports every {PERIOD_S:g} s | numbers | ms | share of a core |\n|---|---|---|---|")
    for process, (count, seconds) in exports(rounds).items():
        print(f"| {process} | {count} | {seconds * 1e3:.2f} | {seconds / PERIOD_S:.2%} |")


if __name__ == "__main__":
    main()
