"""Objects for the Prometheus Operator and Grafana, from the rules and dashboards that ship with the project."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from serve_app.errors import ConfigError
from serve_app.manifests.pods import INSTANCE, Object
from serve_app.manifests.size import Size

_PACKAGE = Path(__file__).parents[1]
# The label by which Grafana's sidecar finds dashboards.
_DASHBOARD_LABEL = {"grafana_dashboard": "1"}
# Tags of Ray's exporter that only multiply series.
_DROPPED = "otel_scope_.*|SessionName|Version"


def folder() -> Path:
    """Return the folder of rules and dashboards: `cluster/observability` of a checkout, else that of the package."""
    installed = _PACKAGE / "observability"
    return installed if installed.is_dir() else _PACKAGE.parent / "cluster" / "observability"


def pod_monitor(size: Size) -> Object:
    """Return the monitor of all Pods, ready or not."""
    cluster = {"sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"], "targetLabel": "ray_io_cluster"}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": size.name, "labels": {INSTANCE: size.name}},
        "spec": {
            "selector": {"matchLabels": {INSTANCE: size.name}},
            "podMetricsEndpoints": [
                {
                    "port": "metrics",
                    "relabelings": [cluster],
                    "metricRelabelings": [{"action": "labeldrop", "regex": _DROPPED}],
                }
            ],
        },
    }


def rules(size: Size, where: Path) -> list[Object]:
    """Return the alert rules of a folder as one object; none if it has no rules.

    Raises:
        ConfigError: a file has no list `groups`.
    """
    groups: list[Any] = []
    for path in sorted([*where.rglob("*.yml"), *where.rglob("*.yaml")]):
        content = yaml.safe_load(path.read_text())
        if isinstance(content, dict) and "groups" in content and "tests" not in content:
            if not isinstance(content["groups"], list):
                raise ConfigError(f"{path}: groups has value {content['groups']!r}, expected a list")
            groups += content["groups"]
    if not groups:
        return []
    return [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": size.name, "labels": {INSTANCE: size.name}},
            "spec": {"groups": groups},
        }
    ]


def dashboards(size: Size, where: Path) -> list[Object]:
    """Return a ConfigMap for each dashboard of a folder."""
    found: list[Object] = []
    for path in sorted(where.rglob("*.json")):
        text = path.read_text()
        content = json.loads(text)
        if not (isinstance(content, dict) and "panels" in content):
            continue
        name = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")
        found.append(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": f"{size.name}-dashboard-{name}", "labels": _DASHBOARD_LABEL},
                "data": {f"{path.stem}.json": text},
            }
        )
    return found
