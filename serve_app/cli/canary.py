"""`wan-serve canary` and `wan-serve generations`: two versions at once, and back. Works on the database alone."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from serve_app.cli.store import ConfigFile, with_store
from serve_app.cli.table import one_cell, print_table

if TYPE_CHECKING:
    from serve_app.jobs.store import JobStore

canary = typer.Typer(no_args_is_help=True, help="Try a second pipeline on a share of the jobs, and go back.")
generations = typer.Typer(no_args_is_help=True, help="Say which of several clusters on one database leases jobs.")
console = Console(highlight=False)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The name of a pipeline application.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@canary.command()
def status(config: ConfigFile, as_json: AsJson = False) -> None:
    """Show the pipelines, their shares, and how the canary does."""

    async def run(store: JobStore) -> list[dict[str, Any]]:
        served, unfinished, evidence = await store.rollout(), await store.unfinished(), await store.evidence()
        rows = []
        for row in served.rows:
            facts: dict[str, Any] = {
                "name": row.name,
                "state": row.state,
                "percent": row.percent,
                "since": row.since,
                "revision": row.revision,
                "unfinished": unfinished.get(row.name, 0),
                "reason": row.reason,
            }
            if row is served.stable:
                facts["percent"] = 100 - (served.canary.percent if served.canary else 0)
            if row is served.canary and evidence is not None:
                facts |= {
                    "ended": len(evidence.outcomes),
                    "failed": evidence.failed,
                    "slowdown": evidence.slowdown,
                    "verdict": row.verdict,
                }
            rows.append(facts)
        return rows

    found = with_store(config, run)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    if not found:
        console.print("one pipeline: no canary was ever set")
        return
    table = []
    for facts in found:
        slowdown = facts.get("slowdown")
        told = facts.get("verdict") or facts["reason"] or "-"
        table.append(
            (
                facts["name"],
                facts["state"],
                f"{facts['percent']:g} %",
                _when(facts["since"]),
                str(facts["unfinished"]),
                str(facts.get("ended", "-")),
                str(facts.get("failed", "-")),
                "-" if slowdown is None else f"{slowdown:.2f}",
                one_cell(told, 120),
            )
        )
    headings = ("NAME", "STATE", "SHARE", "SINCE", "UNFINISHED", "ENDED", "FAILED", "SLOWDOWN", "WHAT")
    print_table(headings, table)


@canary.command("set")
def set_share(
    name: Name,
    percent: Annotated[float, typer.Argument(help="Share of owners whose new jobs it gets; 0 is none.")],
    config: ConfigFile,
) -> None:
    """Begin the trial of a pipeline, or change its share. A larger share only adds owners."""
    from serve_app.config import load_file

    stable = load_file(config)[1].dispatcher.pipeline
    with_store(config, lambda store: store.set_canary(name, percent, stable))
    console.print(f"{name}: canary with {percent:g} %", markup=False)


@canary.command()
def promote(name: Name, config: ConfigFile) -> None:
    """Make a pipeline the stable one. The one before gets no new jobs, and keeps those that it has."""
    from serve_app.config import load_file

    stable = load_file(config)[1].dispatcher.pipeline
    with_store(config, lambda store: store.promote(name, stable))
    console.print(f"{name}: stable", markup=False)


@canary.command()
def abort(
    name: Name,
    config: ConfigFile,
    reason: Annotated[str, typer.Option(help="A sentence that `status` shows.")] = "An operator aborted it.",
) -> None:
    """Take a canary, or a retired pipeline, out of service. Its jobs go to the stable one."""
    moved = with_store(config, lambda store: store.abort(name, reason))
    console.print(f"{name}: aborted; {moved} jobs go to the stable pipeline", markup=False)


@generations.command("list")
def list_generations(config: ConfigFile) -> None:
    """List the generations of dispatchers, the current one first."""
    rows = [
        (row.name, row.state, _when(row.since), f"{silent:.0f} s ago")
        for row, silent in with_store(config, lambda store: store.generations())
    ]
    print_table(("NAME", "STATE", "SINCE", "LAST SEEN"), rows)


@generations.command()
def switch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of a generation, as `list` shows it.")],
    config: ConfigFile,
) -> None:
    """Have a generation lease jobs from now on. The one before ends its jobs or hands them over."""
    before = with_store(config, lambda store: store.switch_generation(name))
    console.print(f"{name}: current" + (f"; {before} is retired" if before else ""), markup=False)


def _when(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")
