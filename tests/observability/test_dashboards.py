"""The checked-in dashboards and rules are what the code says, name metrics that exist, and are valid."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from cluster.observability.__main__ import FOLDER, stale
from cluster.observability.alerts import ALERTS
from cluster.observability.dashboards import DASHBOARDS
from serve_app.metrics.catalog import METRICS
from tests.docs.pages import ROOT, anchors_of
from tests.support.prometheus import promtool

EXPRESSIONS = [target.expression for board in DASHBOARDS for panel in board.panels for target in panel.targets]
OURS = {f"ray_{series}" for metric in METRICS for series in metric.series}
RAYS = {
    "ray_serve_deployment_replica_healthy",
    "ray_serve_replica_processing_queries",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_node_mem_used",
    "ray_node_cpu_utilization",
}
"""Names of Ray's own metrics that are used; the test of a live deployment finds all that a host without GPUs has."""


def test_not_stale() -> None:
    assert not stale(), "`python -m cluster.observability` writes them"


def test_expressions_name_metrics_that_exist() -> None:
    named = {name for expression in EXPRESSIONS for name in re.findall(r"ray_\w+", expression)}
    named |= {name for alert in ALERTS for name in re.findall(r"ray_\w+", alert.expression)}
    assert named <= OURS | RAYS
    assert named >= RAYS


def test_every_metric_is_on_a_dashboard() -> None:
    shown = {name for expression in EXPRESSIONS for name in re.findall(r"ray_\w+", expression)}
    assert {metric.name for metric in METRICS if not shown & {f"ray_{one}" for one in metric.series}} == set()


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.uid)
def test_panels_do_not_overlap_and_have_ids_of_their_own(board) -> None:
    content = json.loads((FOLDER / "dashboards" / f"{board.uid}.json").read_text())
    assert content["uid"] == board.uid and content["schemaVersion"] >= 39
    ids = [panel["id"] for panel in content["panels"]]
    assert len(ids) == len(set(ids))
    cells: set[tuple[int, int]] = set()
    for panel in content["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & own, panel["title"]
        cells |= own


def test_promtool_reads_rules_and_expressions(prometheus_bin: Path, tmp_path: Path) -> None:
    promtool(prometheus_bin, "check", "rules", FOLDER / "rules.yml")
    rules = [
        {"record": f"panel:{index}", "expr": expression.replace("$__rate_interval", "5m")}
        for index, expression in enumerate(EXPRESSIONS)
    ]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool(prometheus_bin, "check", "rules", path)


def test_every_alert_has_a_runbook() -> None:
    known = anchors_of((ROOT / "docs/howto/operate.md").read_text())
    for alert in ALERTS:
        page, _, section = alert.rule()["annotations"]["runbook"].partition("#")
        assert page == "docs/howto/operate.md" and section in known, alert.name


def test_compose_mounts_what_is_there(prometheus_bin: Path, tmp_path: Path) -> None:
    compose = yaml.safe_load((ROOT / "cluster/compose.yaml").read_text())
    services = {name: one for name, one in compose["services"].items() if "observability" in one.get("profiles", [])}
    assert {*services} == {"prometheus", "grafana"}
    mounts = [mount.split(":")[0] for one in services.values() for mount in one["volumes"]]
    for mount in mounts:
        assert mount == "/tmp/ray" or mount in compose["volumes"] or (ROOT / "cluster" / mount).exists(), mount
    content = (FOLDER / "prometheus.yml").read_text().replace("/etc/prometheus/rules.yml", str(FOLDER / "rules.yml"))
    path = tmp_path / "prometheus.yml"
    path.write_text(content)
    promtool(prometheus_bin, "check", "config", path)
