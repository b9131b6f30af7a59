"""`wan-serve simulate`: a fleet on a virtual clock, to see what waits before GPUs are rented."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def simulate(
    fleet: Annotated[Path, typer.Argument(metavar="FLEET", help="A YAML file of the fleet and its demand.")],
    trace: Annotated[
        Path | None, typer.Option(help="Jobs as lines of JSON, instead of those that the fleet's `demand` draws.")
    ] = None,
    write_trace: Annotated[
        Path | None, typer.Option("--write-trace", help="Write the jobs to this file, for `--trace`.")
    ] = None,
) -> None:
    """Simulate a fleet with the real scheduler, order, autoscaling and degrading, and print who waited for how long."""
    import random

    from serve_app.simulate import trace as traces
    from serve_app.simulate.fleet import load_fleet
    from serve_app.simulate.report import text
    from serve_app.simulate.simulation import Simulation

    made = load_fleet(fleet)
    arrivals = traces.recorded(trace) if trace else list(traces.drawn(made, random.Random(made.seed)))
    if write_trace is not None:
        traces.write(arrivals, write_trace)
    print(f"{len(arrivals)} jobs; {made.demand if trace is None else trace}; seed {made.seed}")
    print(text(made, Simulation(made, arrivals).run()))
