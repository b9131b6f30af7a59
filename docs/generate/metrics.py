"""The page of metrics, from the catalog."""

from __future__ import annotations

from collections.abc import Sequence

from docs.generate.markdown import page, table
from serve_app.metrics.catalog import METRICS
from serve_app.metrics.metric import Histogram, Metric

_SHOWN = 8


def metrics_page() -> str:
    """Return the page."""
    return page(
        [
            "# Metrics",
            "Ray puts `ray_` before each name, and adds the labels `WorkerId` (the process) and `NodeAddress` (its "
            "host). A histogram has the series `…_bucket`, `…_sum` and `…_count`. Every process exports its own "
            "numbers, so add them up: `sum(rate(ray_wan_jobs_ended_total[5m]))`. The queue, the store and the storage "
            "are shared by all dispatchers, so take the largest of their numbers: `max(ray_wan_running_jobs)`. "
            "[Monitoring](../howto/monitor.md) says how Prometheus reads them.",
            table((_row(metric) for metric in METRICS), ("name", "kind", "recorded by", "labels", "meaning")),
            "## Buckets",
            table(
                (
                    (f"`{metric.name}`", ", ".join(f"{bound:g}" for bound in metric.bounds))
                    for metric in METRICS
                    if isinstance(metric, Histogram)
                ),
                ("histogram", "upper bounds in seconds"),
            ),
            "## Label values",
            "Labels have closed sets of values: never an id, a prompt, a key or a URL. What is in none of them is "
            "`other`.",
            table(
                (
                    (f"`{metric.name}`", f"`{label}`", _all(values))
                    for metric in METRICS
                    for label, values in _long(metric)
                ),
                ("metric", "label", "values"),
            ),
        ]
    )


def _row(metric: Metric) -> tuple[str, ...]:
    labels = [
        f"`{label}`" + ("" if len(values) > _SHOWN else f" ({', '.join(values)})")
        for label, values in metric.labels.items()
    ]
    return f"`{metric.name}`", metric.kind, ", ".join(metric.by), "; ".join(labels) or "none", metric.sentence


def _long(metric: Metric) -> list[tuple[str, Sequence[str]]]:
    """Return the labels whose values do not fit into the first table."""
    return [(label, values) for label, values in metric.labels.items() if len(values) > _SHOWN]


def _all(values: Sequence[str]) -> str:
    if len(values) > 32:  # numbers
        return f"`{values[0]}` to `{values[-2]}`, `{values[-1]}`"
    return ", ".join(f"`{value}`" for value in values)
