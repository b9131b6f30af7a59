"""`wan-serve doctor`: look at a running deployment, and say what is wrong and what to do."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from serve_app.launch.shipped import config_file


class WeightsLook(StrEnum):
    """The care with which weights are compared between hosts."""

    sample = "sample"
    full = "full"
    none = "none"


def doctor(
    config: Annotated[
        Path,
        typer.Option("--config", callback=config_file, help="The configuration that is served; `/dev/stdin` works."),
    ],
    weights: Annotated[
        WeightsLook, typer.Option(help="Compare the weights' sizes and samples, all their bytes, or nothing.")
    ] = WeightsLook.sample,
    offline: Annotated[bool, typer.Option("--offline", help="Look at services and this machine, not at Ray.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for programs.")] = False,
) -> None:
    """Check a running deployment: one line for each finding. The exit status is 1 if there is an error."""
    from serve_app.doctor.examine import examine
    from serve_app.doctor.finding import Level

    def say(line: str) -> None:
        print(f"looking at {line}", file=sys.stderr)

    found = examine(config, say, weights=weights.value, offline=offline)
    worst = [level for level in Level if any(one.level == level for one in found)][-1]
    if as_json:
        print(json.dumps({"status": str(worst), "findings": [one.to_json() for one in found]}, indent=2))
    else:
        for one in sorted(found, key=lambda one: list(Level).index(one.level), reverse=True):
            print(one)
    if worst == Level.error:
        raise typer.Exit(1)
