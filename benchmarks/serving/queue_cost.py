"""Seconds of a decision with thousands of jobs in the queue: admission, the claim, a step of the scheduler.

    python -m benchmarks.serving.queue_cost [--queued 10000] [--url sqlite:////tmp/queue.db]

`admission, database` is what a create adds in queries; `admission, forecast` is the computation. With SQLite the
processor's time holds the database's, and on a busy machine it is the one to look at.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable

from sqlalchemy import insert

from benchmarks.machine import describe
from serve_app.db.tables import Job
from serve_app.engine.scheduler import Entry, Scheduler
from serve_app.jobs.backlog import read_backlog
from serve_app.jobs.forecast import forecast
from serve_app.jobs.store import JobStore
from serve_app.request import Params
from serve_app.simulate.fleet import Clip, work_of

PARAMS: Params = Clip().params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--url", default="", help="of a database without jobs; a file of SQLite if not given")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    print(f"\n{describe()}; {options.queued} jobs queued, medians of {options.repeats}\n")
    print("| decision | processor ms | passed ms |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure(options.url or f"sqlite:///{folder}/jobs.db", options.queued, options.repeats))
    scheduler(options.repeats)


async def measure(url: str, queued: int, repeats: int) -> None:
    store = JobStore(url, work_of=work_of)
    await store.start()
    await fill(store, queued)
    job = await store.create(PARAMS, "wan")

    async def cold() -> None:
        async with store.database.read() as session:
            await store._look(session)

    async def sums() -> None:
        async with store.database.read() as session:
            await store._far_back(session, job, await store.pace(), time.time())

    async def predict() -> None:
        await store.predict(job)

    async def backlog() -> None:
        async with store.database.read() as session:
            await read_backlog(session, time.time())

    async def play() -> None:
        forecast(store._upcoming, await store.pace(), store._fleet, time.time())

    async def create() -> None:
        await store.create(PARAMS, "wan")

    async def claim() -> None:
        await store.claim("me", 60)

    named: tuple[tuple[str, Callable[[], Awaitable[None]]], ...] = (
        ("admission, database: the first jobs, once a second", cold),
        ("admission: a job far back, by the sums of the last second", predict),
        ("a look at a job far back, database", sums),
        ("admission, forecast of the first jobs", play),
        ("autoscaling, database: the backlog, once in `poll_s`", backlog),
        ("a whole create", create),
        ("a whole claim", claim),
    )
    for name, call in named:
        await call()
        taken, passed = [], []
        for _ in range(repeats):
            began, processor = time.perf_counter(), time.process_time()
            await call()
            taken.append(time.process_time() - processor)
            passed.append(time.perf_counter() - began)
        print(
            f"| {name} | {1000 * statistics.median(taken):.2f} | {1000 * statistics.median(passed):.2f} |", flush=True
        )
    await store.close()


async def fill(store: JobStore, queued: int) -> None:
    """Store waiting jobs of a hundred owners, and some that have completed."""
    now = time.time()
    common = {
        "model": "wan",
        "params": PARAMS.model_dump(),
        "work": work_of(PARAMS),
        "ranks": 1,
        "priority": "standard",
    }
    common |= {"step": 0, "steps": 0, "progress": 0, "attempt": 0, "failures": 0, "interruptions": 0, "losses": 0}
    common |= {"resumed_step": 0, "saved_step": 0, "not_before": 0.0, "announced_at": 0.0, "cancel_requested": False}
    common |= {"outputs": {}, "timings": {}, "warnings": []}
    rows = []
    for nth in range(queued + 50):
        at = now - queued + nth
        ended = nth >= queued
        rows.append(
            {
                **common,
                "id": f"video_{int(at * 1e6):014x}{secrets.token_hex(12)}",
                "owner": f"owner{nth % 100}",
                "created_at": at,
                "turn": at + 900,
                "status": "completed" if ended else "queued",
                "attempt": 1 if ended else 0,
                "started_at": at if ended else None,
                "completed_at": at + 380 if ended else None,
                "group_s": 375.0 if ended else None,
                "passes": 40.0 if ended else None,
            }
        )
    async with store.database.write() as session:
        for start in range(0, len(rows), 500):
            await session.execute(insert(Job.__table__), rows[start : start + 500])  # type: ignore[arg-type]


def scheduler(repeats: int) -> None:
    """Print the seconds of a step's decision in a full group."""
    made = Scheduler(8, 10**9)
    for nth in range(16):
        made.add(Entry(str(nth), (21, 90, 160), True, 75_600, 40, 26, priority=nth % 3, work=100.0 + nth))
    taken = []
    for _ in range(100 * repeats):
        began = time.perf_counter()
        made.pick(0.0)
        taken.append(time.perf_counter() - began)
    print(f"| a step of the scheduler, 16 samples inside | | {1000 * statistics.median(taken):.4f} |")


if __name__ == "__main__":
    main()
