"""The alerts, and Prometheus's rules for them.

An alert pages somebody only for what users notice or soon will; the rest are tickets. Each has a section of its name in
docs/howto/operate.md, which says what to look at and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cluster.observability.expressions import failed_share, increase, judged, largest, of

RUNBOOK = "docs/howto/operate.md"
# Share of jobs that may fail by the service's own fault (the objective is 99 %).
BUDGET = 0.01
# Ends below which a share says nothing: of two jobs, one that failed is half.
_FLOOR = 20


@dataclass(frozen=True)
class Alert:
    """A rule that fires.

    Attributes:
        name: its name, and the title of its section in the runbook.
        expression: PromQL; it fires while this has a result.
        for_s: seconds for which it has to hold first.
        severity: `page` wakes somebody; a `ticket` waits for the morning.
        summary: one sentence for whoever is woken. `{{ $value }}` is the value of the expression.
    """

    name: str
    expression: str
    for_s: int
    severity: Literal["page", "ticket"]
    summary: str

    def rule(self) -> dict[str, Any]:
        """Return the rule as Prometheus reads it."""
        runbook = f"{RUNBOOK}#{self.name.lower()}"
        return {
            "alert": self.name,
            "expr": self.expression,
            "for": f"{self.for_s}s",
            "labels": {"severity": self.severity},
            "annotations": {"summary": self.summary, "runbook": runbook},
        }


def _burn(times: float, long: str, short: str, floor: int = _FLOOR) -> str:
    """Return the expression for a budget that is used up some times too fast, over a long and a short window."""
    limit = f"{times * BUDGET:g}"
    return (
        f"{failed_share(long)} > {limit} and on () {failed_share(short)} > {limit} and on () {judged(long)} >= {floor}"
    )


def _tries(outcome: str) -> str:
    return increase(of("wan_deliveries_total", outcome=outcome), window="30m")


ALERTS = (
    Alert(
        "WanFailuresFast",
        _burn(14.4, "1h", "5m"),
        120,
        "page",
        "{{ $value | humanizePercentage }} of the last hour's jobs failed by our own fault.",
    ),
    Alert(
        "WanFailures",
        _burn(6, "6h", "30m"),
        300,
        "page",
        "{{ $value | humanizePercentage }} of the last six hours' jobs failed by our own fault.",
    ),
    Alert(
        "WanFailuresSlow",
        _burn(1, "3d", "6h", floor=100),
        3600,
        "ticket",
        "{{ $value | humanizePercentage }} of the last three days' jobs failed by our own fault.",
    ),
    Alert(
        "WanOldestWait",
        f"{largest(of('wan_oldest_wait_seconds', priority='interactive'))} > 120",
        600,
        "page",
        "An interactive job has waited for {{ $value | humanizeDuration }}.",
    ),
    Alert(
        "WanBacklog",
        f"{largest('wan_queued_work_seconds')} > 3600",
        1800,
        "ticket",
        "The jobs that wait are {{ $value | humanizeDuration }} of work.",
    ),
    Alert(
        "WanNothingEnds",
        f"{largest('wan_running_jobs')} > 0 and on () {increase('wan_jobs_ended_total', window='30m')} == 0",
        1800,
        "page",
        "{{ $value }} jobs run, and none has ended for half an hour.",
    ),
    Alert(
        "WanGroupLosses",
        f"{increase(of('wan_attempts_failed_total', reason='group_lost'), window='1h')} > 3",
        0,
        "ticket",
        "{{ $value | humanize }} attempts lost their denoiser group within an hour.",
    ),
    Alert(
        "WanPoisonousJob",
        f"{increase(of('wan_jobs_ended_total', reason='poisonous'), window='1h')} > 0",
        0,
        "ticket",
        "A job was given up because groups died in the same step of it again and again.",
    ),
    Alert(
        "WanCanaryAborted",
        f"{increase(of('wan_canaries_ended_total', end='aborted'), window='1h')} > 0",
        0,
        "ticket",
        "A canary was taken out of service by itself.",
    ),
    Alert(
        "WanStepsOutOfMemory",
        f"{increase('wan_steps_out_of_memory_total', window='1h')} > 0",
        0,
        "ticket",
        "{{ $value | humanize }} steps within an hour did not fit into GPU memory.",
    ),
    Alert(
        "WanIntakeClosed",
        "min(ray_wan_intake_open) == 0",
        120,
        "page",
        "A gateway refuses jobs, because the storage or the disk of the job store forbids it.",
    ),
    Alert(
        "WanStorageUnusable",
        f"{largest('wan_storage_usable')} == 0",
        300,
        "page",
        "No video can be stored.",
    ),
    Alert(
        "WanStorageFills",
        "min(predict_linear(ray_wan_free_storage_bytes[6h], 86400)) < 0",
        3600,
        "ticket",
        "The disk of the videos will be full within a day.",
    ),
    Alert(
        "WanStoreUnreachable",
        f"{largest('wan_store_reachable')} == 0",
        60,
        "page",
        "No dispatcher reaches the job store.",
    ),
    Alert(
        "WanPaused",
        f"{largest('wan_paused')} == 1",
        3600,
        "ticket",
        "The queue has been paused for more than an hour.",
    ),
    Alert(
        "WanDeliveriesFail",
        f"{_tries('given_up')} > 5 and on () {_tries('given_up')} > {_tries('delivered')}",
        600,
        "ticket",
        "{{ $value | humanize }} webhooks or mails were given up within half an hour, more than were delivered.",
    ),
    Alert(
        "WanApiErrors",
        f"{increase(of('wan_http_requests_total', status='5xx'), window='5m')} / "
        f"{increase('wan_http_requests_total', window='5m')} > 0.05 and on () "
        f"{increase('wan_http_requests_total', window='5m')} >= 20",
        120,
        "page",
        "{{ $value | humanizePercentage }} of the API's answers are errors of the server.",
    ),
    Alert(
        "WanUnhealthy",
        "min by (deployment) (ray_serve_deployment_replica_healthy) == 0",
        300,
        "page",
        "A process of {{ $labels.deployment }} has been unhealthy for five minutes.",
    ),
    Alert(
        "WanNoData",
        "absent(ray_wan_store_reachable)",
        300,
        "page",
        "No dispatcher has told anything for five minutes: it, Ray or the scraping is down.",
    ),
)


def rules() -> dict[str, Any]:
    """Return the content of a file of rules."""
    return {"groups": [{"name": "serve_app", "interval": "15s", "rules": [alert.rule() for alert in ALERTS]}]}
