"""`wan-serve status`: replicas, groups and their memory, samples inside, the queue, and what is loading."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from serve_app.cli.store import with_store
from serve_app.cli.table import print_table
from serve_app.errors import ServeAppError
from serve_app.launch.shipped import config_file

if TYPE_CHECKING:
    from serve_app.jobs.store import JobStore
    from serve_app.jobs.waiting import Waiting
    from serve_app.launch.fleet import Replica

_GB = 1e9
_STALE_S = 15.0
console = Console(highlight=False)


def status(
    config: Annotated[
        Path | None, typer.Option("--config", help="Configuration of the server; else the one that runs here.")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--ray", envvar="RAY_ADDRESS", help="Ray of the server; else the one that runs here.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks with --watch.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with --watch one line for each look.")] = False,
) -> None:
    """Show replicas, groups and their memory, the samples inside, the queue by class, and what is loading."""
    from serve_app.launch import fleet

    path, address = _server(config, address)
    fleet.join(address)
    while True:
        replicas, queue = fleet.replicas(), with_store(path, _look)
        if as_json:
            print(json.dumps(plain(replicas, queue), indent=None if watch else 2), flush=True)
        else:
            if watch:
                console.clear()
            _show(replicas, queue)
        if not watch:
            return
        time.sleep(every)


def plain(replicas: list[Replica], queue: Waiting) -> dict[str, Any]:
    """Return the status as plain values."""
    return {
        "replicas": [one.plain() for one in replicas],
        "loading": [f"{one.deployment}/{one.id}" for one in replicas if one.state == "loading"],
        "queue": {
            "jobs": dict(queue.jobs),
            "work_tflop": dict(queue.work),
            "running": queue.running,
            "running_work_tflop": queue.running_work,
            "seconds_waiting": queue.seconds(_groups(replicas)),
        },
    }


async def _look(store: JobStore) -> Waiting:
    from serve_app.jobs.waiting import waiting

    async with store.database.read() as session:
        return await waiting(session)


def _server(config: Path | None, address: str | None) -> tuple[Path, str]:
    """Return the configuration and the Ray that are meant: those that are named, else of the server that runs here."""
    from serve_app.launch.claim import running

    if config is not None and address is not None:
        return config_file(config), address
    wanted = None if config is None else config_file(config).absolute()
    here = [one for one in running() if one.ray and wanted in (None, Path(one.file))]
    if len(here) != 1:
        what = "several servers run" if here else "no such server runs"
        files = ", ".join(sorted(one.file for one in here))
        raise ServeAppError(f"{what} on this host{f' ({files})' if files else ''}, expected --config and --ray")
    return config_file(config) if config is not None else Path(here[0].file), address or here[0].ray


def _show(replicas: list[Replica], queue: Waiting) -> None:
    print_table(
        ("STAGE", "REPLICA", "HOST", "STATE", "MESH", "SAMPLES", "WAITING", "MEMORY GB", "OF PLAN", "LEFT"),
        [_row(one) for one in replicas],
    )
    if rows := list(_memory(replicas)):
        print()
        headings = ("MEMORY OF", "ALLOCATED GB", "RESERVED", "PEAK", "FREE", "MAY TAKE", "PLANNED", "PARTS")
        print_table(headings, rows)
    if samples := list(_samples(replicas)):
        print()
        print_table(("SAMPLE", "CLASS", "STEP", "GROUP"), samples)
    print()
    rows = [(name, str(count), f"{queue.work[name]:.1f}") for name, count in sorted(queue.jobs.items())]
    print_table(("QUEUE", "JOBS", "TFLOP"), [*rows, ("running", str(queue.running), f"{queue.running_work:.1f}")])
    seconds = queue.seconds(_groups(replicas))
    print(f"work waiting: {'unknown until a job has ended' if seconds is None else f'{seconds:.0f} s'}")
    for one in replicas:
        if one.state == "loading":
            print(f"loading: {one.deployment} {one.id} for {one.seconds:.0f} s{f' on {one.host}' if one.host else ''}")


def _row(one: Replica) -> tuple[str, ...]:
    note, fullest = one.note, _fullest(one)
    state = one.state if one.note_s < _STALE_S else f"{one.state}, silent for {one.note_s:.0f} s"
    if note.get("tight"):
        state += ", memory short"
    inside = (str(len(note.get("samples", []))), str(note.get("waiting", 0))) if one.group and note else ("-", "-")
    memory = ("-", "-", "-")
    if fullest is not None:
        share = f"{100 * fullest['peak'] / fullest['planned']:.0f} %" if fullest["planned"] else "-"
        memory = (f"{fullest['peak'] / _GB:.2f}", share, f"{100 * _left(fullest):.0f} %")
    return (one.deployment, one.id, one.host or "-", state, note.get("mesh", "-"), *inside, *memory)


def _memory(replicas: list[Replica]) -> Iterator[tuple[str, ...]]:
    for one in replicas:
        for index, memory in enumerate(one.note.get("memory", [])):
            what = f"rank {index}" if one.group else f"device {index}"
            numbers = (memory[name] for name in ("allocated", "reserved", "peak", "free", "limit", "planned"))
            parts = ", ".join(f"{name} {size / _GB:.2f}" for name, size in memory["parts"].items() if size)
            yield (
                f"{one.deployment} {one.id} {what}",
                *("-" if number is None else f"{number / _GB:.2f}" for number in numbers),
                parts,
            )


def _samples(replicas: list[Replica]) -> Iterator[tuple[str, ...]]:
    for one in replicas:
        for sample in one.note.get("samples", []):
            yield sample["id"], sample["priority"], f"{sample['step']}/{sample['steps']}", f"{one.deployment} {one.id}"


def _fullest(one: Replica) -> dict[str, Any] | None:
    """Return the memory of the device that has least left; None if the replica has told nothing."""
    found: list[dict[str, Any]] = one.note.get("memory", [])
    return min(found, key=_left, default=None)


def _left(memory: dict[str, Any]) -> float:
    from serve_app.device_memory import DeviceMemory

    given = {**memory, "limit": float("inf") if memory["limit"] is None else memory["limit"]}
    return DeviceMemory(**given).headroom


def _groups(replicas: list[Replica]) -> int:
    """Return the number of videos that are denoised at once: the groups, or half of them where experts are split."""
    running = [one for one in replicas if one.group and one.state == "running"]
    low = sum(one.deployment == "LowNoiseDenoiser" for one in running)
    return min(low, len(running) - low) if low else len(running)
