"""`wan-serve jobs`: what an operator does with the queue. Acts on the store, so it works while nothing is served."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from serve_app.cli_store import ConfigFile, with_store
from serve_app.errors import ServeAppError

if TYPE_CHECKING:
    from serve_app.jobs.store import JobStore

jobs = typer.Typer(no_args_is_help=True, help="Look at the queue, and pause it for maintenance.")
console = Console(highlight=False)

# Between two looks at what still runs.
_DRAIN_S = 0.5


@jobs.command()
def status(config: ConfigFile) -> None:
    """How many jobs there are, and whether they are paused."""

    async def run(store: JobStore) -> None:
        since = await store.paused_since()
        counts = await store.counts()
        console.print("running" if since is None else f"paused since {_when(since)}", style="bold")
        for name in ("queued", "in_progress", "completed", "failed"):
            console.print(f"{counts.get(name, 0):>8}  {name}")

    with_store(config, run)


@jobs.command()
def pause(config: ConfigFile) -> None:
    """Begin no more jobs. Those that run go on, new ones are accepted and wait."""

    async def run(store: JobStore) -> None:
        new = await store.pause()
        console.print(f"{'paused' if new else 'paused already'}; {await store.running()} jobs run")

    with_store(config, run)


@jobs.command()
def resume(config: ConfigFile) -> None:
    """Begin jobs again."""

    async def run(store: JobStore) -> None:
        console.print("resumed" if await store.resume() else "was not paused")

    with_store(config, run)


@jobs.command()
def drain(config: ConfigFile) -> None:
    """Pause, and wait until no job runs any more. Ctrl-C ends the waiting, not the pause."""

    async def run(store: JobStore) -> None:
        await store.pause()
        told = None
        while running := await store.running():
            if running != told:
                console.print(f"paused; {running} jobs run")
                told = running
            await asyncio.sleep(_DRAIN_S)
        console.print("paused; no job runs")

    with_store(config, run)


@jobs.command("list")
def list_jobs(
    config: ConfigFile,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 20,
    order: Annotated[Literal["asc", "desc"], typer.Option(help="By age: desc is the newest first.")] = "desc",
) -> None:
    """Jobs by age."""

    async def run(store: JobStore) -> None:
        found, more = await store.list(None, limit, order)
        for job in found:
            at = f"{job.stage} {job.step}/{job.steps}" if job.status == "in_progress" and job.stage else ""
            what = job.error_code or at or "-"
            # Not a table of rich's: that would cut the ids to the width of the terminal.
            print(
                f"{job.id}  {_when(job.created_at)}  {job.status:<11}  {job.priority:<11}  {job.owner or '-'}  {what}"
            )
        if more:
            print("… and more")

    with_store(config, run)


@jobs.command()
def show(config: ConfigFile, video_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """All that is known of a job, as JSON."""

    async def run(store: JobStore) -> None:
        job = await store.get(video_id)
        position = await store.position(video_id)
        if job is None:
            raise ServeAppError(f"ID has value {video_id[:80]!r}, expected the id of a job")
        columns = {column.key: getattr(job, column.key) for column in job.__table__.columns}
        print(json.dumps({**columns, "queue_position": position}, indent=2, ensure_ascii=False))

    with_store(config, run)


def _when(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")
