"""Requests per second and latency of the gateway over a table with a long history.

    python -m benchmarks.serving.gateway [--rows 1000 10000 100000] [--connections 50] [--requests 3000]

The application runs under uvicorn in a process of its own, the load in this one, without Ray and without a dispatcher:
what is measured is routes and job store. Creates come in rounds of as many as may wait, after each of which the queue
is emptied behind the server's back; retrieves take random videos of the history; lists are pages of 20, the newest and
those that start at a random video.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import insert, update

from benchmarks.machine import describe
from serve_app.config import Config, StoreConfig
from serve_app.db.tables import Job
from serve_app.gateway.app import create_app
from serve_app.jobs.store import JobStore
from serve_app.launch.address import free_port
from serve_app.request import VideoRequest, resolve
from serve_app.storage import Storage

POSTGRES = os.environ.get("WAN_TEST_POSTGRES", "postgresql://root@127.0.0.1:5432/test")
PROMPT = "A red circle moves to the right on a white background"
BATCH = 1000


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--stores", nargs="+", default=["sqlite", "postgresql"])
    arguments.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    arguments.add_argument("--connections", type=int, default=50)
    arguments.add_argument("--requests", type=int, default=3000, help="of each kind")
    arguments.add_argument("--serve", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.serve:
        asyncio.run(serve(Config.model_validate_json(options.serve)))
        return
    print(f"\n{describe()}; {options.connections} connections, {options.requests} requests of each kind\n")
    print("| store | rows | request | requests/s | p50 ms | p99 ms |")
    print("|---|---|---|---|---|---|", flush=True)
    for store in options.stores:
        with tempfile.TemporaryDirectory(prefix="wan-bench-") as home, database(store) as url:
            config = Config(home=home, store=StoreConfig(url=url))
            asyncio.run(measure(store, config, sorted(options.rows), options.connections, options.requests))


@contextmanager
def database(store: str) -> Iterator[str]:
    """The URL of an empty database, which is gone afterwards. Empty for SQLite in the home folder."""
    if store == "sqlite":
        yield ""
        return
    import asyncpg

    async def run(statement: str) -> None:
        connection = await asyncpg.connect(POSTGRES, timeout=5)
        await connection.execute(statement)
        await connection.close()

    name = f"wan_bench_{secrets.token_hex(6)}"
    try:
        asyncio.run(run(f"CREATE DATABASE {name}"))
    except (OSError, TimeoutError) as error:
        raise SystemExit(f"PostgreSQL at {POSTGRES} cannot be used: {error}") from None
    try:
        yield f"{POSTGRES.rpartition('/')[0]}/{name}"
    finally:
        asyncio.run(run(f"DROP DATABASE {name} WITH (FORCE)"))


async def serve(config: Config) -> None:
    """The gateway's application on the port in the environment, without anybody who works off its queue."""
    store = JobStore(config.store_url, config.dispatcher.late_outputs_s, config.ageing)
    await store.start()

    async def nothing() -> None:
        return None

    app = create_app(config, store, Storage(config.storage_options), nothing, nothing)
    port = int(os.environ["BENCH_PORT"])
    await uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off")).serve()


async def measure(name: str, config: Config, sizes: list[int], connections: int, requests: int) -> None:
    """Print a row for each size of the table and kind of request."""
    store = JobStore(config.store_url)
    await store.start()
    history: list[str] = []
    try:
        for rows in sizes:
            history += await fill(store, config, rows - len(history))
            async with server(config) as port:
                await load(port, connections, connections, lambda: get("/v1/videos?limit=1"))  # opens the store's own
                if rows == sizes[-1]:
                    print(row(name, rows, "create", *await creates(port, connections, requests, config, store)))
                for what, make in reads(history):
                    if rows == sizes[-1] or what != "retrieve":
                        print(row(name, rows, what, *await load(port, connections, requests, make)), flush=True)
    finally:
        await store.close()


def reads(history: list[str]) -> list[tuple[str, Callable[[], bytes]]]:
    """The kinds of requests that change nothing."""
    return [
        ("retrieve", lambda: get(f"/v1/videos/{random.choice(history)}")),
        ("list, newest", lambda: get("/v1/videos")),
        ("list, anywhere", lambda: get(f"/v1/videos?after={random.choice(history)}")),
    ]


async def creates(
    port: int, connections: int, requests: int, config: Config, store: JobStore
) -> tuple[float, list[float]]:
    """As `load` returns: rounds of as many creates as may wait."""
    body = json.dumps({"prompt": PROMPT}).encode()
    seconds, times = 0.0, []
    while (left := requests - len(times)) > 0:
        took, each = await load(port, connections, min(left, config.limits.queued_jobs), lambda: post(body))
        seconds, times = seconds + took, times + each
        await empty_queue(store)
    return seconds, times


def row(store: str, rows: int, what: str, seconds: float, times: list[float]) -> str:
    ordered = sorted(times)
    p50, p99 = (ordered[int(len(ordered) * share)] * 1000 for share in (0.5, 0.99))
    return f"| {store} | {rows:,} | {what} | {len(times) / seconds:.0f} | {p50:.1f} | {p99:.1f} |"


async def fill(store: JobStore, config: Config, rows: int) -> list[str]:
    """Add videos that were completed before today; their ids."""
    params = resolve(VideoRequest(prompt=PROMPT), config).model_dump()
    day = time.time() - 86_400
    ids = []
    for first in range(0, rows, BATCH):
        jobs: list[dict[str, Any]] = []
        for _ in range(min(BATCH, rows - first)):
            created = day - random.random() * 30 * 86_400
            video_id = f"video_{int(created * 1e6):014x}{secrets.token_hex(12)}"
            outputs = {kind: f"videos/{video_id}/1/{kind}" for kind in ("video.mp4", "thumbnail.jpg")}
            jobs.append(
                {
                    "id": video_id,
                    "model": config.model.name,
                    "params": params,
                    "status": "completed",
                    "progress": 100,
                    "attempt": 1,
                    "created_at": int(created * 1e6) / 1e6,
                    "turn": created + 900,
                    "started_at": created + 1,
                    "completed_at": created + 60,
                    "outputs": outputs,
                    "timings": {"encode": 0.1, "denoise": 50.0, "decode": 5.0},
                    "size_bytes": 5_000_000,
                }
            )
        async with store._db.write() as session:
            await session.execute(insert(Job), jobs)
        ids += [job["id"] for job in jobs]
    return ids


async def empty_queue(store: JobStore) -> None:
    async with store._db.write() as session:
        await session.execute(update(Job).where(Job.status == "queued").values(status="completed", progress=100))


@asynccontextmanager
async def server(config: Config) -> AsyncIterator[int]:
    """A process that serves; yields its port."""
    port = free_port()
    log = config.home_path / "server.log"
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.serving.gateway", "--serve", config.model_dump_json()),
            env={**os.environ, "BENCH_PORT": str(port)},
            cwd=Path(__file__).parents[2],
            stderr=output,  # a line for each create, as in production
        )
    try:
        while not await listens(port):
            if process.returncode is not None:
                raise RuntimeError(f"the server did not start: {log.read_text()[-500:]}")
            await asyncio.sleep(0.1)
        yield port
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: bench\r\n\r\n".encode()


def post(body: bytes) -> bytes:
    headers = ("POST /v1/videos HTTP/1.1", "host: localhost", "content-type: application/json")
    return "\r\n".join((*headers, f"content-length: {len(body)}", "", "")).encode() + body


async def load(port: int, connections: int, count: int, make: Callable[[], bytes]) -> tuple[float, list[float]]:
    """Send `count` requests, one after the other on each of the connections, which stay open.

    Returns:
        Seconds from the first to the last, and those of each request.
    """
    left = iter(range(count))

    async def connection() -> list[float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        times = []
        for _ in left:  # shared: a fast connection takes more
            began = time.perf_counter()
            writer.write(make())
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            answer = await reader.readexactly(length)
            times.append(time.perf_counter() - began)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"unexpected answer: {head.splitlines()[0]!r} {answer[:200]!r}")
        writer.close()
        return times

    began = time.perf_counter()
    times = await asyncio.gather(*(connection() for _ in range(connections)))
    return time.perf_counter() - began, [one for each in times for one in each]


if __name__ == "__main__":
    main()
