"""Dashboards of Grafana as Python values, and their classic JSON (schema version 39).

The JSON is deterministic: ids and places on the grid follow from the order, so that a change of one panel is a small
change of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 39
_WIDTH = 24
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Target:
    """A query of a panel.

    Attributes:
        expression: PromQL. `$__rate_interval` is the shortest window that holds several scrapes.
        legend: the name of its lines, with `{{label}}` for the value of a label; empty for all labels.
        gpu: whether it has data only where there are GPUs.
    """

    expression: str
    legend: str = ""
    gpu: bool = False


@dataclass(frozen=True)
class Panel:
    """A panel of lines, or of one number.

    Attributes:
        title: what it shows.
        targets: its queries.
        unit: Grafana's word for the unit: `s`, `bytes`, `short`, `percentunit`, `reqps`.
        sentence: how to read it.
        kind: `timeseries`, or `stat` for the last value.
        stack: whether lines stand on one another.
        width: of 24 columns.
        red_above: the last value from which a number is red; None for never.
        red_below: the last value below which a number is red; None for never.
    """

    title: str
    targets: tuple[Target, ...]
    unit: str = "short"
    sentence: str = ""
    kind: str = "timeseries"
    stack: bool = False
    width: int = 8
    red_above: float | None = None
    red_below: float | None = None

    def json(self, panel_id: int, x: int, y: int) -> dict[str, Any]:
        """Return the panel at a place of the grid."""
        defaults: dict[str, Any] = {"unit": self.unit, "thresholds": {"mode": "absolute", "steps": self._steps()}}
        options: dict[str, Any] = {"legend": {"displayMode": "list", "placement": "bottom"}}
        if self.kind == "stat":
            options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
        else:
            defaults["custom"] = {
                "fillOpacity": 30 if self.stack else 0,
                "stacking": {"mode": "normal" if self.stack else "none"},
            }
        return {
            "id": panel_id,
            "type": self.kind,
            "title": self.title,
            "description": self.sentence,
            "datasource": _SOURCE,
            "gridPos": {"x": x, "y": y, "w": self.width, "h": self.height},
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": options,
            "targets": [
                {
                    "refId": chr(ord("A") + index),
                    "datasource": _SOURCE,
                    "expr": target.expression,
                    "legendFormat": target.legend or "__auto",
                }
                for index, target in enumerate(self.targets)
            ],
        }

    @property
    def height(self) -> int:
        """Rows of the grid that it takes."""
        return 4 if self.kind == "stat" else 8

    def _steps(self) -> list[dict[str, Any]]:
        if self.red_below is not None:
            return [{"color": "red", "value": None}, {"color": "green", "value": self.red_below}]
        green: list[dict[str, Any]] = [{"color": "green", "value": None}]
        return green if self.red_above is None else [*green, {"color": "red", "value": self.red_above}]


@dataclass(frozen=True)
class Row:
    """Panels below a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """A dashboard.

    Attributes:
        uid: its name in URLs, which stays.
        title: its name for people.
        sentence: what question it answers.
        rows: its panels.
    """

    uid: str
    title: str
    sentence: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels in their order."""
        return tuple(panel for row in self.rows for panel in row.panels)

    def json(self) -> dict[str, Any]:
        """Return the JSON that Grafana imports."""
        panels: list[dict[str, Any]] = []
        y = 0
        for row in self.rows:
            place = {"x": 0, "y": y, "w": _WIDTH, "h": 1}
            panels.append({"id": len(panels) + 1, "type": "row", "title": row.title, "gridPos": place, "panels": []})
            x, y, tallest = 0, y + 1, 0
            for panel in row.panels:
                if x + panel.width > _WIDTH:
                    x, y, tallest = 0, y + tallest, 0
                panels.append(panel.json(len(panels) + 1, x, y))
                x, tallest = x + panel.width, max(tallest, panel.height)
            y += tallest
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.sentence,
            "tags": ["serve_app"],
            "schemaVersion": SCHEMA_VERSION,
            "editable": True,
            "refresh": "10s",
            "time": {"from": "now-3h", "to": "now"},
            "timezone": "browser",
            "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
            "links": [{"type": "dashboards", "tags": ["serve_app"], "title": "serve_app", "asDropdown": True}],
            "panels": panels,
        }


def lines(title: str, *targets: tuple[str, str] | Target, **options: Any) -> Panel:
    """Return a panel of lines, from pairs of expression and legend."""
    return Panel(title, tuple(one if isinstance(one, Target) else Target(*one) for one in targets), **options)


def number(title: str, expression: str, unit: str = "short", **options: Any) -> Panel:
    """Return a panel of one number."""
    return Panel(title, (Target(expression),), unit, kind="stat", width=options.pop("width", 4), **options)
