"""Canaries and upgrades under steady load: what is lost, and how many of its jobs a bad canary gets.

    python -m benchmarks.faults.canary [--trials upgrade failing slow absent good] [--jobs 150] [--rate 1] [--seed 0]
        [--server postgresql://me@127.0.0.1:5432/test]

Two dispatchers, each with two pipelines, share a PostgreSQL, of this run's own or the given one; jobs of forty owners
come at a steady rate. The pipelines are without a model: they take four seconds for a video, give or take a fifth, and
store real files.

- `upgrade`: dispatchers of a second generation start after a fifth of the jobs and take over.
- `failing`, `slow`, `absent`: a canary with two fifths of the owners starts after a fifth of the jobs. It fails a
  third of its jobs; takes three times as long; is not there.
- `good`: the same, with a canary that is as good as the stable pipeline.

`its jobs` are those that the canary was given until it was aborted, except those that never reached it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import select

from benchmarks.faults.servers import Postgres
from benchmarks.machine import describe
from serve_app.config import CanaryConfig, DispatcherConfig
from serve_app.db.notifications import Event as Notice
from serve_app.db.tables import Job
from serve_app.dispatch.dispatcher import Dispatcher
from serve_app.dispatch.generation import Gate
from serve_app.dispatch.judge import Judge
from serve_app.dispatch.pipelines import Pipelines
from serve_app.dispatch.run import PipelineUnavailable, Runner
from serve_app.events import Event
from serve_app.job_spec import JobSpec
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from tests.support.fakes import PARAMS, FakePipeline

TRIALS = ("upgrade", "failing", "slow", "absent", "good")
OWNERS = 40
PERCENT = 40.0
VIDEO_S = 4.0
SETTLE_S = 180.0
"""Seconds that all jobs may take to end after the last one was created."""
NEXT = "wan-next"
OPTIONS = DispatcherConfig(
    running_jobs=16,
    poll_s=0.5,
    lease_s=10,
    retry_s=0.2,
    drain_s=5,
    canary=CanaryConfig(bake_s=0, start_within_s=20, auto_promote=True),
)


@dataclass
class Served:
    """A pipeline without a model, and the jobs that it got.

    Args:
        storage: where its files go.
        times: its time, as a multiple of the stable pipeline's.
        failing: the share of jobs that it fails.
        absent: it cannot be reached.
    """

    storage: Storage
    rng: random.Random
    times: float = 1.0
    failing: float = 0.0
    absent: bool = False
    got: set[str] = field(default_factory=set)

    async def __call__(self, job: JobSpec) -> AsyncGenerator[Event, None]:
        if self.absent:
            raise PipelineUnavailable("it is not there")
        self.got.add(job.id)
        errors: list[Exception] = [ZeroDivisionError("it fails")] if self.rng.random() < self.failing else []
        step_s = VIDEO_S * self.times * self.rng.uniform(0.8, 1.2) / (PARAMS.num_inference_steps + 1)
        async for event in FakePipeline(self.storage, step_s=step_s, errors=errors)(job):
            yield event


@dataclass
class Cluster:
    """A dispatcher with its judge and its own connection to the database."""

    store: JobStore
    dispatcher: Dispatcher
    judge: Judge

    @classmethod
    async def start(cls, url: str, storage: Storage, pipelines: dict[str, Runner], generation: str = "") -> Cluster:
        store = JobStore(url, late_outputs_s=2)
        await store.start()
        gate = Gate(store, generation, OPTIONS.drain_s)
        runner = Pipelines("wan", pipelines.__getitem__)
        made = cls(store, Dispatcher(store, storage, runner, OPTIONS, gate=gate), Judge(store, OPTIONS))
        made.dispatcher.start()
        made.judge.start()
        return made

    async def stop(self) -> None:
        await self.judge.stop()
        await self.dispatcher.stop()
        await self.store.close()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--trials", nargs="+", choices=TRIALS, default=TRIALS)
    arguments.add_argument("--jobs", type=int, default=150)
    arguments.add_argument("--rate", type=float, default=1.0, help="jobs a second")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--server", help="URL of a database of a PostgreSQL to use in place of one of its own")
    options = arguments.parse_args()
    print(f"\n{describe()}; pipelines without a model, {options.rate:g} jobs a second, seed {options.seed}\n")
    print("| trial | jobs | s | lost | doubled | failed | its jobs | it failed | ended after s | end |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for trial in options.trials:
        with tempfile.TemporaryDirectory(prefix="wan-canary-") as name:
            folder = Path(name)
            folder.chmod(0o755)  # PostgreSQL runs as another user
            with _database(folder, options.server) as url:
                print(asyncio.run(run(trial, folder, url, options)), flush=True)


@contextmanager
def _database(folder: Path, server: str | None) -> Iterator[str]:
    """Yield the URL of an empty database, which is gone afterwards."""
    if server is None:
        postgres = Postgres(folder / "postgres")
        try:
            yield postgres.url
        finally:
            postgres.kill()
        return
    name = f"wan_canary_{secrets.token_hex(6)}"
    asyncio.run(_execute(server, f"CREATE DATABASE {name}"))
    try:
        yield f"{server.rpartition('/')[0]}/{name}"
    finally:
        asyncio.run(_execute(server, f"DROP DATABASE {name} WITH (FORCE)"))


async def _execute(server: str, statement: str) -> None:
    connection = await asyncpg.connect(server)
    await connection.execute(statement)
    await connection.close()


async def run(trial: str, folder: Path, url: str, options: argparse.Namespace) -> str:
    """Return the row of a trial."""
    rng = random.Random(options.seed)
    storage = Storage(str(folder / "videos"))
    wan = Served(storage, rng)
    canary = Served(
        storage,
        rng,
        times=3.0 if trial == "slow" else 1.0,
        failing=1 / 3 if trial == "failing" else 0.0,
        absent=trial == "absent",
    )
    pipelines: dict[str, Runner] = {"wan": wan, NEXT: canary}
    old = "v1" if trial == "upgrade" else ""
    clusters = [await Cluster.start(url, storage, pipelines, old) for _ in range(2)]
    async with _store(url) as store:
        began = time.monotonic()
        made: list[str] = []
        trial_at = ended_at = None
        while len(made) < options.jobs:
            if len(made) == options.jobs // 5:
                trial_at = time.monotonic()
                if trial == "upgrade":
                    newer: dict[str, Runner] = {"wan": canary}
                    clusters += [await Cluster.start(url, storage, newer, "v2") for _ in range(2)]
                else:
                    await store.set_canary(NEXT, PERCENT, "wan")
            owner = f"owner {rng.randrange(OWNERS)}"
            made.append((await store.create(PARAMS, "wan", owner=owner)).id)
            if trial_at is not None and ended_at is None and await _is_over(store, trial):
                ended_at = time.monotonic()
            await asyncio.sleep(max(began + len(made) / options.rate - time.monotonic(), 0))
        until = time.monotonic() + SETTLE_S
        while {"queued", "in_progress"} & (await store.counts()).keys() and time.monotonic() < until:
            await asyncio.sleep(0.2)
            if ended_at is None and await _is_over(store, trial):
                ended_at = time.monotonic()
        seconds = time.monotonic() - began
        for cluster in clusters:
            await cluster.stop()
        took = "-" if ended_at is None or trial_at is None else f"{ended_at - trial_at:.1f}"
        found = await _judge(store, storage, trial, made, canary)
    return f"| {trial} | {options.jobs} | {seconds:.0f} | {found[0]} | {took} | {found[1]} |"


async def _is_over(store: JobStore, trial: str) -> bool:
    if trial == "upgrade":
        return (await store.generations())[0][0].name == "v2"
    return (await store.rollout()).canary is None


async def _judge(store: JobStore, storage: Storage, trial: str, made: list[str], canary: Served) -> tuple[str, str]:
    async with store.database.read() as session:
        rows = {job.id: job for job in await session.scalars(select(Job))}
        notices = list(await session.scalars(select(Notice.video_id).where(Notice.type == "video.completed")))
    served = await store.rollout()
    row = served.find(NEXT)
    lost = [name for name in made if name not in rows or not rows[name].finished]
    failed = [job for job in rows.values() if job.status == "failed"]
    doubled = len(rows) - len(made) + len(notices) - len(set(notices))
    for job in rows.values():
        if job.status == "completed" and not await storage.list(f"videos/{job.id}/{job.attempt}"):
            lost.append(job.id)
    for name in lost:
        print(f"lost: {name}", file=sys.stderr)
    for job in failed:
        print(f"failed: {job.id}: {job.error_code}: {job.error_message}", file=sys.stderr)
    tried = sum(job.tried_on == NEXT for job in rows.values())
    its = len(canary.got)
    if trial == "upgrade":
        end = f"{its} jobs by the new generation, the last by {(await store.generations())[0][0].name}"
    else:
        end = "none" if row is None else f"{row.state}: {row.reason or row.verdict}"
    return f"{len(lost)} | {doubled} | {len(failed)} | {its} | {tried}", end


@asynccontextmanager
async def _store(url: str) -> AsyncIterator[JobStore]:
    def work_of(_: Any) -> float:
        return 1.0

    store = JobStore(url, late_outputs_s=2, work_of=work_of)
    await store.start()
    yield store
    await store.close()


if __name__ == "__main__":
    main()
