"""`wan-serve jobs`: look at the queue and pause it. Works on the database, so no server has to run."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from serve_app.cli.store import ConfigFile, with_store
from serve_app.cli.table import print_table
from serve_app.errors import ServeAppError
from serve_app.launch.shipped import config_file

if TYPE_CHECKING:
    from serve_app.jobs.store import JobStore

jobs = typer.Typer(no_args_is_help=True, help="Look at the queue, and pause it for maintenance.")
console = Console(highlight=False)

ShownStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]

# `drain` counts the running jobs this often.
_DRAIN_POLL_S = 0.5
# The clock of the host that made a job may be ahead of this one's by so much.
_CLOCK_SKEW_S = 3600


@jobs.command()
def status(config: ConfigFile) -> None:
    """Show how many jobs there are, and whether they are paused."""

    async def run(store: JobStore) -> None:
        since = await store.paused_since()
        counts = await store.counts()
        console.print("running" if since is None else f"paused since {_when(since)}", style="bold")
        for name in ("queued", "in_progress", "completed", "failed", "cancelled"):
            console.print(f"{counts.get(name, 0):>8}  {name}")

    with_store(config, run)


@jobs.command()
def pause(config: ConfigFile) -> None:
    """Start no more jobs. Running jobs go on; new ones are accepted and wait."""

    async def run(store: JobStore) -> None:
        new = await store.pause()
        console.print(f"{'paused' if new else 'paused already'}; {await store.running()} jobs run")

    with_store(config, run)


@jobs.command()
def resume(config: ConfigFile) -> None:
    """Start jobs again."""

    async def run(store: JobStore) -> None:
        console.print("resumed" if await store.resume() else "was not paused")

    with_store(config, run)


@jobs.command()
def drain(config: ConfigFile) -> None:
    """Pause, and wait until no job runs. Ctrl-C ends the waiting, not the pause."""

    async def run(store: JobStore) -> None:
        await store.pause()
        told = None
        while running := await store.running():
            if running != told:
                console.print(f"paused; {running} jobs run")
                told = running
            await asyncio.sleep(_DRAIN_POLL_S)
        console.print("paused; no job runs")

    with_store(config, run)


@jobs.command("list")
def list_jobs(
    config: ConfigFile,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Largest number of jobs to list.")] = 20,
    order: Annotated[Literal["asc", "desc"], typer.Option(help="By age; desc lists the newest first.")] = "desc",
    status: Annotated[ShownStatus | None, typer.Option(help="List only jobs with this status.")] = None,
) -> None:
    """List jobs by age."""

    async def run(store: JobStore) -> None:
        paused = await store.paused_since() is not None
        found, more = await store.list(None, limit, order, status=status)
        rows = []
        for job in found:
            at = f"{job.stage} {job.step}/{job.steps}" if job.status == "in_progress" and job.stage else ""
            if job.status == "queued" and paused:
                at = "paused"
            what = job.error_code or at or "-"
            rows.append((job.id, _when(job.created_at), job.shown_status, job.priority, job.owner or "-", what))
        print_table(("ID", "CREATED", "STATUS", "PRIORITY", "KEY", "WHAT"), rows)
        if more:
            print("… and more")

    with_store(config, run)


@jobs.command()
def show(config: ConfigFile, video_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Show all that the database holds of a job, as JSON."""
    from sqlalchemy import inspect

    async def run(store: JobStore) -> None:
        job = await store.get(video_id)
        position = await store.position(video_id)
        if job is None:
            raise _unknown(video_id)
        columns = {column.key: getattr(job, column.key) for column in inspect(type(job)).column_attrs}
        print(json.dumps({**columns, "queue_position": position}, indent=2, ensure_ascii=False))

    with_store(config, run)


@jobs.command()
def logs(
    video_id: Annotated[str, typer.Argument(metavar="ID")],
    config: Annotated[
        Path | None, typer.Option("--config", help="Check first that this file's database has the job.")
    ] = None,
    ray_dir: Annotated[
        Path | None, typer.Option("--ray-dir", help="Ray's folder on this host, if it is not a usual one.")
    ] = None,
) -> None:
    """Show what the processes on this host logged about a job, by time. Reads the logs of ended Rays, too."""
    from serve_app.cli.ray_logs import job_lines, session_folders
    from serve_app.db.tables import id_time

    created_at = id_time(video_id)
    if config is not None:

        async def run(store: JobStore) -> bool:
            return await store.get(video_id) is not None

        if not with_store(config_file(config), run):
            raise _unknown(video_id)
    if created_at is None:
        raise _unknown(video_id)
    if ray_dir is not None and not ray_dir.is_dir():
        raise ServeAppError(f"--ray-dir has value '{ray_dir}', expected a folder that holds Ray's `session_…` folders")
    sessions = session_folders(ray_dir)
    lines = job_lines(sessions, video_id, created_at - _CLOCK_SKEW_S)
    if not lines:
        folders = [session / "logs" for session in sessions]
        unread = [folder for folder in folders if not os.access(folder, os.R_OK | os.X_OK)]
        where = ", ".join(f"'{folder}'{' (not readable)' if folder in unread else ''}" for folder in folders)
        where = where or "no folder: no session of Ray is there"
        raise ServeAppError(f"no line of {video_id} on host {socket.gethostname()!r}; looked in {where}")
    for line in lines:
        print(line)


def _unknown(video_id: str) -> ServeAppError:
    return ServeAppError(f"ID has value {video_id[:80]!r}, expected the id of a job")


def _when(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")
