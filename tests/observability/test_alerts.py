"""Each alert fires on the trouble that it is for, does not on what only looks like it, and resolves (promtool)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.observability.alerts import ALERTS, Alert
from tests.support.prometheus import promtool

Series = dict[str, str]
"""Values of each series by time, in promtool's notation: `0+2x5` is 0, 2, 4, 6, 8, 10; `_x5` is no value."""


@dataclass(frozen=True)
class Case:
    """What an alert is tried on.

    Attributes:
        trouble: series on which it fires at minute `fires` and no longer at minute `resolved`.
        calm: series on which it does not fire until then.
        every: minutes between two values of a series, and between two looks at the rule.
    """

    trouble: Series
    fires: int
    resolved: int
    calm: Series
    every: int = 1


def ended(reason: str) -> str:
    return f'ray_wan_jobs_ended_total{{reason="{reason}",priority="standard",WorkerId="a"}}'


def gauge(name: str, labels: str = 'WorkerId="a"') -> str:
    return f"ray_wan_{name}{{{labels}}}"


INTERACTIVE = 'priority="interactive",WorkerId="a"'
GIVEN_UP, DELIVERED = (
    f'ray_wan_deliveries_total{{kind="webhook",outcome="{one}"}}' for one in ("given_up", "delivered")
)
BAD, GOOD = (f'ray_wan_http_requests_total{{route="get",status="{one}"}}' for one in ("5xx", "2xx"))
CANARY_ABORTED, CANARY_PROMOTED = (f'ray_wan_canaries_ended_total{{end="{one}"}}' for one in ("aborted", "promoted"))
LOST = 'ray_wan_attempts_failed_total{reason="group_lost"}'
HEALTHY = 'ray_serve_deployment_replica_healthy{deployment="Denoiser",replica="r"}'

CASES = {
    "WanFailuresFast": Case(
        {ended("completed"): "0+1x300", ended("internal_error"): "0+1x90 90x210"},
        fires=80,
        resolved=110,
        # Users cancel; and of three jobs at night two fail, which is no rate.
        calm={ended("completed"): "0 1x300", ended("cancelled"): "0+5x300", ended("internal_error"): "0 0+1x2 2x300"},
    ),
    "WanFailures": Case(
        {ended("completed"): "0+9x1000", ended("group_lost"): "0+1x500 500x500"},
        fires=400,
        resolved=600,
        calm={ended("completed"): "0+99x500", ended("group_lost"): "0+1x500"},
    ),
    "WanFailuresSlow": Case(
        {ended("completed"): "0+97x900", ended("decoder_lost"): "0+3x460 1380x440"},
        fires=4500,
        resolved=5200,
        calm={ended("completed"): "0+999x500", ended("decoder_lost"): "0+1x500"},
        every=10,
    ),
    "WanOldestWait": Case(
        {gauge("oldest_wait_seconds", INTERACTIVE): "0x5 130x20 3x30"},
        fires=20,
        resolved=30,
        # Batch jobs wait for hours, and an interactive one may wait for a moment.
        calm={
            gauge("oldest_wait_seconds", 'priority="batch",WorkerId="a"'): "9000x60",
            gauge("oldest_wait_seconds", INTERACTIVE): "0x5 200x5 0x50",
        },
    ),
    "WanBacklog": Case(
        {gauge("queued_work_seconds"): "4000x60 100x60"}, 45, 80, calm={gauge("queued_work_seconds"): "3500x120"}
    ),
    "WanNothingEnds": Case(
        {gauge("running_jobs"): "4x200", ended("completed"): "0+1x10 10x100 10+1x90"},
        fires=90,
        resolved=130,
        # Nothing runs at night; and before the first end there is a counter at 0 already.
        calm={gauge("running_jobs"): "0x200", ended("completed"): "10x200"},
    ),
    "WanGroupLosses": Case({LOST: "0x10 0+1x8 8x200"}, 20, 120, calm={LOST: "0x10 1x60 2x60 3x60"}),
    "WanPoisonousJob": Case({ended("poisonous"): "0x10 1x200"}, 15, 100, calm={ended("poisonous"): "7x200"}),
    "WanCanaryAborted": Case({CANARY_ABORTED: "0x10 1x200"}, 15, 100, calm={CANARY_PROMOTED: "0x10 1x200"}),
    "WanStepsOutOfMemory": Case(
        {"ray_wan_steps_out_of_memory_total": "0x10 1x200"},
        15,
        100,
        calm={"ray_wan_steps_out_of_memory_total": "3x200"},
    ),
    "WanIntakeClosed": Case(
        {gauge("intake_open"): "1x10 0x10 1x30", gauge("intake_open", 'WorkerId="b"'): "1x50"},
        fires=15,
        resolved=25,
        calm={gauge("intake_open"): "1x10 0x1 1x60"},
    ),
    "WanStorageUnusable": Case(
        {gauge("storage_usable"): "1x5 0x20 1x30"}, 15, 40, calm={gauge("storage_usable"): "1x5 0x3 1x40"}
    ),
    "WanStorageFills": Case(
        {gauge("free_storage_bytes"): "1000000-1000x480 900000x600"},
        fires=470,
        resolved=1000,
        calm={gauge("free_storage_bytes"): "1000000-100x480"},
    ),
    "WanStoreUnreachable": Case(
        {gauge("store_reachable"): "1x5 0x10 1x30", gauge("store_reachable", 'WorkerId="b"'): "1x5 0x10 1x30"},
        fires=10,
        resolved=20,
        # One dispatcher of two reaches it.
        calm={gauge("store_reachable"): "0x40", gauge("store_reachable", 'WorkerId="b"'): "1x40"},
    ),
    "WanPaused": Case({gauge("paused"): "1x90 0x60"}, 80, 120, calm={gauge("paused"): "1x50 0x100"}),
    "WanDeliveriesFail": Case(
        {GIVEN_UP: "0+1x60 60x100", DELIVERED: "0x160"},
        fires=45,
        resolved=120,
        calm={GIVEN_UP: "0+1x120", DELIVERED: "0+9x120"},
    ),
    "WanApiErrors": Case(
        {BAD: "0+5x30 150x60", GOOD: "0+20x90"},
        fires=20,
        resolved=60,
        calm={BAD: "0+1x60", GOOD: "0+1x60"},  # half of very few
    ),
    "WanUnhealthy": Case({HEALTHY: "1x5 0x15 1x30"}, 15, 30, calm={HEALTHY: "1x5 0x2 1x40"}),
    "WanNoData": Case({gauge("store_reachable"): "1x10 _x30 1x30"}, 30, 60, calm={gauge("store_reachable"): "0x60"}),
}


def firing(alert: str, minute: int, expected: bool) -> dict[str, Any]:
    return {
        "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)',
        "eval_time": f"{minute}m",
        "exp_samples": [{"labels": "{}", "value": int(expected)}],
    }


def trial(series: Series, every: int, questions: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "interval": f"{every}m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": questions,
    }


def test_every_alert_has_a_case() -> None:
    assert [alert.name for alert in ALERTS] == [*CASES]


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_alert_fires_and_resolves_and_keeps_quiet(alert: Alert, prometheus_bin: Path, tmp_path: Path) -> None:
    case, name = CASES[alert.name], alert.name
    last = max(case.fires, case.resolved)
    minutes = range(0, last, max(last // 40 // case.every * case.every, case.every))
    tests = [
        trial(case.trouble, case.every, [firing(name, case.fires, True), firing(name, case.resolved, False)]),
        trial(case.calm, case.every, [firing(name, minute, False) for minute in minutes]),
    ]
    # This rule alone, seldom looked at: promtool would look at all of them every few seconds of these days.
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [alert.rule()]}]}))
    content = {"rule_files": [str(rules)], "evaluation_interval": f"{case.every}m", "tests": tests}
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump(content))
    promtool(prometheus_bin, "test", "rules", path)
