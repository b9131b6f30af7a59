"""Pictures of the dashboards, from a tiny deployment under load.

    python -m benchmarks.serving.dashboard_pictures [--seconds 180] [--to docs/pictures]

Deploys a small random model, scrapes it with a real Prometheus, sends jobs of all classes, and draws every panel of the
overview by its own expressions. Nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib

from cluster.observability.dashboards import OVERVIEW
from cluster.observability.panels import Dashboard, Panel
from tests.support.deployed import deployed
from tests.support.prometheus import Prometheus, find, scraping
from tests.support.random_checkpoint import write

matplotlib.use("Agg")
from matplotlib import pyplot

_WINDOW = "30s"
_COLUMNS = 12


def load(url: str, seconds: float) -> None:
    """Send jobs in waves, some of which are cancelled or refused."""
    draw = random.Random(7)
    began = time.monotonic()
    with httpx.Client(base_url=url, timeout=60) as http:
        while (now := time.monotonic() - began) < seconds:
            steps = draw.choice((10, 20, 60))
            body = {
                "prompt": "a star" if draw.random() < 0.9 else "",
                "num_inference_steps": steps,
                "priority": draw.choice(("interactive", "standard", "standard", "batch")),
            }
            answer = http.post("/v1/videos", json=body)
            if answer.status_code == 200 and draw.random() < 0.1:
                http.post(f"/v1/videos/{answer.json()['id']}/cancel")
            time.sleep(draw.expovariate(1.5 + math.sin(2 * math.pi * now / 90)))


def draw(board: Dashboard, prometheus: Prometheus, start: float, end: float, path: Path) -> None:
    """Draw a dashboard over a span of time."""
    panels = board.panels
    numbers = [panel for panel in panels if panel.kind == "stat"]
    others = [panel for panel in panels if panel.kind != "stat"]
    rows = [numbers[first : first + 6] for first in range(0, len(numbers), 6)]
    rows += [others[first : first + 3] for first in range(0, len(others), 3)]
    heights = [1 if row[0].kind == "stat" else 2.4 for row in rows]
    figure = pyplot.figure(figsize=(15, 1.25 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(rows), _COLUMNS, height_ratios=heights)
    for index, row in enumerate(rows):
        width = 2 if row[0].kind == "stat" else 4
        for place, panel in enumerate(row):
            axes = figure.add_subplot(grid[index, place * width : (place + 1) * width])
            _panel(axes, panel, prometheus, start, end)
    figure.suptitle(board.title)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _panel(axes: Any, panel: Panel, prometheus: Prometheus, start: float, end: float) -> None:
    axes.set_title(panel.title, fontsize=9)
    axes.tick_params(labelsize=7)
    drawn = []
    for target in panel.targets:
        expression = target.expression.replace("$__rate_interval", _WINDOW)
        for series in prometheus.range(expression, start, end, 2):
            times = [(float(at) - start) for at, _ in series["values"]]
            values = [float(value) for _, value in series["values"]]
            drawn.append((_legend(target.legend, series["metric"]), times, values))
    if panel.kind == "stat":
        axes.axis("off")
        text = f"{drawn[0][2][-1]:.4g}" if drawn else "no data"
        if drawn and panel.unit == "bytes":
            text = f"{drawn[0][2][-1] / 2**30:.1f} GiB"
        elif drawn and panel.unit == "percentunit":
            text = f"{drawn[0][2][-1]:.1%}"
        elif drawn and panel.unit == "s":
            text = f"{drawn[0][2][-1]:.1f} s"
        axes.text(0.5, 0.4, text, ha="center", va="center", fontsize=18, transform=axes.transAxes)
        return
    for legend, times, values in drawn:
        axes.plot(times, values, label=legend, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_ylabel({"s": "seconds", "bytes": "bytes"}.get(panel.unit, ""), fontsize=7)
    if any(legend for legend, _, _ in drawn):
        axes.legend(fontsize=6, loc="upper left", ncols=2)


def _legend(text: str, labels: dict[str, str]) -> str:
    """Return a legend with the values of its labels."""
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), text)


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--to", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        with (
            deployed(write(folder / "checkpoint"), folder) as deployment,
            scraping(find(), folder, deployment.metrics) as prometheus,
        ):
            start = time.time()
            loading = threading.Thread(target=load, args=(deployment.url, arguments.seconds))
            loading.start()
            loading.join()
            time.sleep(12)  # the last numbers are on their way
            draw(OVERVIEW, prometheus, start + 15, time.time(), arguments.to / "overview.png")
    print(f"drawn: {arguments.to / 'overview.png'}")


if __name__ == "__main__":
    main()
