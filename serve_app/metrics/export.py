"""The export of this process's metrics by Ray's agents, whose `/metrics` Prometheus reads.

Every number goes out as a gauge of Ray that is set again and again, counters and histograms too. Ray's own counters and
histograms have three faults (Ray 2.60). The agent of a host keeps those of a process that has ended for ever, so every
restarted replica makes it larger. It makes up the sum of a histogram from the middles of the buckets. And a counter is
not there before its first event, so the first event is no increase. Gauges of a process that has ended vanish after two
of the agent's reports, the sums here are exact, and counters begin at 0. Prometheus computes rates from the values; it
does not ask for the type. What a process records in its last seconds, before the next export and report, is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from serve_app.metrics.catalog import METRICS
from serve_app.metrics.metric import Metric, Process

# Seconds between two exports. Ray reports every 10 s and forgets a gauge that was not set between two reports.
PERIOD_S = 4.0

_started: set[str] = set()


class Exporter:
    """Sets a gauge of Ray for every number of some metrics.

    Args:
        metrics: the metrics to export.
        make: makes a gauge of a name, a description and label names.
    """

    def __init__(self, metrics: tuple[Metric, ...], make: Callable[[str, str, tuple[str, ...]], Any]) -> None:
        self._metrics = metrics
        self._make = make
        self._gauges: dict[str, Any] = {}

    def export(self) -> int:
        """Set every gauge; return how many numbers that were."""
        count = 0
        for metric in self._metrics:
            for name, labels, value in metric.samples():
                gauge = self._gauges.get(name)
                if gauge is None:
                    gauge = self._gauges[name] = self._make(name, metric.sentence, tuple(labels))
                gauge.set(value, labels)
                count += 1
        return count


def start(process: Process) -> None:
    """Begin to export, from a thread that ends with the process, what a kind of process records.

    Further calls have no effect, and neither has a call in a process that has not joined a Ray.

    Args:
        process: the kind of this process. Its counters begin at 0.
    """
    import ray
    from ray.util.metrics import Gauge

    if process in _started or not ray.is_initialized():
        return
    _started.add(process)
    own = tuple(metric for metric in METRICS if process in metric.by)
    for metric in own:
        metric.begin()
    threading.Thread(target=_keep_exporting, args=(Exporter(own, Gauge),), name="metrics", daemon=True).start()


def _keep_exporting(exporter: Exporter) -> None:
    pause = threading.Event()
    while True:
        exporter.export()
        pause.wait(PERIOD_S)
