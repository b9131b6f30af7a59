"""Expressions that dashboards and alerts share."""

from __future__ import annotations

from serve_app.metrics.catalog import COMPLETED

WINDOW = "$__rate_interval"

# Ends that say nothing about the health of the service: the owner, the deadline or the request decided.
NOT_OURS = "|".join(("cancelled", "deadline_exceeded", "deleted", "duplicate"))


def of(series: str, **labels: str) -> str:
    """Return a series with some label values."""
    chosen = ",".join(f'{label}="{value}"' for label, value in labels.items())
    return f"{series}{{{chosen}}}"


def rate(series: str, *by: str, window: str = WINDOW) -> str:
    """Return the rate per second of a counter, summed over processes."""
    return f"{_sum(by)}(rate(ray_{series}[{window}]))"


def increase(series: str, *by: str, window: str) -> str:
    """Return the increase of a counter, summed over processes."""
    return f"{_sum(by)}(increase(ray_{series}[{window}]))"


def largest(series: str, *by: str) -> str:
    """Return a gauge that all dispatchers measure alike."""
    return f"max{_by(by)}(ray_{series})"


def total(series: str, *by: str) -> str:
    """Return the sum of a gauge over processes."""
    return f"{_sum(by)}(ray_{series})"


def quantile(share: float, histogram: str, *by: str, window: str = WINDOW) -> str:
    """Return a quantile of a histogram."""
    return f"histogram_quantile({share}, sum by ({', '.join((*by, 'le'))}) (rate(ray_{histogram}_bucket[{window}])))"


def mean(histogram: str, *by: str, window: str = WINDOW) -> str:
    """Return the mean of a histogram, from its exact sum."""
    return f"{rate(f'{histogram}_sum', *by, window=window)} / {rate(f'{histogram}_count', *by, window=window)}"


def by_reason(times: int, series: str) -> str:
    """Return the rate of each reason that occurs, times a number of seconds, and of all together."""
    every = f"{times} * {rate(series)}"
    return f'{times} * {rate(series, "reason")} > 0 or label_replace({every}, "reason", "all", "", "")'


def failed_share(window: str) -> str:
    """Return the share of ended jobs that failed by the service's own fault, without those that others ended."""
    return f"{_ended(f'{COMPLETED}|{NOT_OURS}', window)} / {judged(window)}"


def judged(window: str) -> str:
    """Return how many jobs ended that say something about the service."""
    return _ended(NOT_OURS, window)


def _ended(without: str, window: str) -> str:
    return increase(f'wan_jobs_ended_total{{reason!~"{without}"}}', window=window)


def _sum(by: tuple[str, ...]) -> str:
    return f"sum{_by(by)}"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else ""
