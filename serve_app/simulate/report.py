"""The table of a simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from serve_app.config import Priority
from serve_app.simulate.fleet import Fleet
from serve_app.simulate.simulation import Outcome, Result


@dataclass(frozen=True)
class Row:
    """The end of the jobs of a class.

    Attributes:
        name: the class, or `all`.
        jobs: number of jobs that came.
        waits: median, 95th and 99th percentile of the seconds that others took before or beside a job.
        late: share of jobs that waited for longer than the target of their class, refused ones included.
        refused: share of jobs that were refused.
        degraded: share of jobs of which less was made.
    """

    name: str
    jobs: int
    waits: tuple[float, float, float]
    late: float
    refused: float
    degraded: float


def rows(fleet: Fleet, result: Result) -> list[Row]:
    """Return a row for each class that came, and one for all."""
    targets = fleet.denoiser.autoscaling.target_wait_s.model_dump()
    found = []
    for name in (*get_args(Priority), "all"):
        some = [one for one in result.outcomes if name in ("all", one.arrival.priority)]
        if some:
            found.append(_row(name, some, targets))
    return found


def _row(name: str, some: Sequence[Outcome], targets: dict[str, float]) -> Row:
    waits = sorted(one.wait_s for one in some if one.done_at is not None)
    late = sum(one.wait_s > targets[one.arrival.priority] for one in some)
    refused = len(some) - len(waits)
    degraded = sum(one.degraded for one in some)
    middle, most, worst = (_percentile(waits, share) for share in (50, 95, 99))
    return Row(name, len(some), (middle, most, worst), late / len(some), refused / len(some), degraded / len(some))


def gpu_hours(fleet: Fleet, result: Result) -> float:
    """Return the GPU-hours of all groups, from the moment at which each was asked for."""
    return result.group_s * fleet.gpus / 3600


def text(fleet: Fleet, result: Result) -> str:
    """Return the report: one line on the fleet, and a Markdown table."""
    hours = max(result.ended_at / 3600, 1e-9)
    busy = result.busy_s / result.group_s if result.group_s else 0.0
    lines = [
        f"simulated: {gpu_hours(fleet, result):.0f} GPU-hours in {hours:.1f} h, groups busy {busy:.1%}, at most "
        f"{result.most_groups} groups of {fleet.gpus}, {result.level_changes / hours:.1f} level changes an hour",
        "",
        "| class | jobs | wait p50 s | p95 s | p99 s | late | refused | degraded |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(fleet, result):
        waits = " | ".join(f"{wait:.0f}" for wait in row.waits)
        lines.append(f"| {row.name} | {row.jobs} | {waits} | {row.late:.2%} | {row.refused:.2%} | {row.degraded:.2%} |")
    return "\n".join(lines)


def _percentile(values: Sequence[float], share: int) -> float:
    """Return a percentile of sorted values, by nearest rank."""
    return values[max(math.ceil(len(values) * share / 100) - 1, 0)] if values else 0.0
