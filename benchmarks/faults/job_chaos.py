"""Jobs while everything around them is killed: gateways, dispatchers, database, broker and S3 server.

    python -m benchmarks.faults.job_chaos [--stack sqlite services] [--jobs 200] [--faults 40] [--seed 0] [--real]

`sqlite`: SQLite and a folder. `services`: PostgreSQL, RabbitMQ and an S3 server (Swift), each of this run's own. Two
gateways and two dispatchers are processes under a supervisor, as Serve is one; the pipeline takes a tenth of a second a
step, and stores real files. With --real gateway, dispatcher and the pipeline with the tiny model are the deployments of
`configs/tiny.yaml`, on a Ray of this run's own.

Three keys create jobs, each with an `Idempotency-Key`, and repeat a request until it is answered; every tenth job is
cancelled. At random moments something is killed, and a server started again 0.5 to 4 seconds later. At the end the
database, the storage and the API are asked what there is.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from sqlalchemy import select

from benchmarks.faults.fleet import TINY, Fleet, Processes, Ray
from benchmarks.faults.servers import Postgres, RabbitMQ, Server
from benchmarks.machine import describe
from serve_app.config import Config, validate
from serve_app.db.tables import Job, Usage
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server

OWNERS = 3
OPEN = 12
"""Number of jobs that are under way at a time."""
REQUEST = {"prompt": "a red circle moves right", "size": "64x64", "num_frames": 9, "num_inference_steps": 8}
SETTLE_S = 300.0
"""Seconds that all jobs may take to end after the last fault."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--stack", nargs="+", choices=["sqlite", "services"], default=["sqlite", "services"])
    arguments.add_argument("--jobs", type=int, default=200)
    arguments.add_argument("--faults", type=int, default=40)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--real", action="store_true")
    options = arguments.parse_args()
    os.environ.update(AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET_KEY)
    print(f"\n{describe()}; {'real pipeline' if options.real else 'pipeline without a model'}, seed {options.seed}\n")
    print("| stack | jobs | faults | s | lost | doubled | charged wrong | stuck | wrong owner | done | cancelled |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for stack in options.stack:
        with tempfile.TemporaryDirectory(prefix="wan-chaos-") as name:
            folder = Path(name)
            folder.chmod(0o755)  # PostgreSQL runs as another user
            with servers(stack, folder) as (sections, external):
                args = configuration(folder, sections)
                fleet: Fleet = Ray(folder, args) if options.real else Processes(folder, args)
                asyncio.run(run(stack, validate(args), fleet, external, options))


@contextmanager
def servers(stack: str, folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the configuration's sections of a stack, and its servers by name."""
    if stack == "sqlite":
        yield {}, {}
        return
    external: dict[str, Any] = {}
    try:
        external["PostgreSQL"] = postgres = Postgres(folder / "postgres")
        external["RabbitMQ"] = rabbitmq = RabbitMQ(folder / "rabbitmq")
        (folder / "s3").mkdir()
        external["S3"] = s3 = S3Server(folder / "s3")
        options: dict[str, Any] = {"timeout_s": 3, "retry_s": 3, "proxy": True}
        storage = s3.options(s3.make_bucket(), **options).model_dump(include={"url", "endpoint", "region", *options})
        queue = {"transport": "rabbitmq", "url": rabbitmq.url, "poll_s": 3}
        yield {"store": {"url": postgres.url}, "queue": queue, "storage": storage}, external
    finally:
        for server in external.values():
            server.kill() if isinstance(server, Server) else server.stop()


def configuration(folder: Path, sections: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of both applications."""
    args: dict[str, Any] = yaml.safe_load(TINY.read_text(encoding="utf-8"))["applications"][0]["args"]
    options = {"lease_s": 3, "retry_s": 0.5, "poll_s": 0.5, "late_outputs_s": 5, "running_jobs": 4}
    args.update(home=str(folder / "home"), auth={"mode": "keys"}, dispatcher=options, **sections)
    return args


@dataclass
class Load:
    """The clients: what each key has created, and which of it was cancelled."""

    urls: list[str]
    keys: list[str]
    made: dict[str, int] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)

    async def ask(self, owner: int, method: str, path: str, **request: Any) -> httpx.Response:
        """Return an answer below 500 from whichever gateway is there."""
        headers = {"authorization": f"Bearer {self.keys[owner]}", **request.pop("headers", {})}
        while True:
            url = random.choice(self.urls)
            with suppress(httpx.HTTPError):
                async with httpx.AsyncClient(base_url=url, timeout=10, headers=headers) as http:
                    answer = await http.request(method, path, **request)
                    if answer.status_code < 500:
                        return answer
            await asyncio.sleep(0.2)

    async def job(self, number: int, open_jobs: asyncio.Semaphore) -> None:
        """Follow one job from its request to its end."""
        owner = number % OWNERS
        async with open_jobs:
            named = {"Idempotency-Key": f"job {number}"}
            answer = await self.ask(owner, "POST", "/v1/videos", json={**REQUEST, "seed": number}, headers=named)
            video = answer.raise_for_status().json()
            self.made[video["id"]] = owner
            if number % 10 == 0:
                self.cancelled.add(video["id"])
                await self.ask(owner, "POST", f"/v1/videos/{video['id']}/cancel")
            while video["status"] not in ("completed", "failed"):
                await asyncio.sleep(0.3)
                video = (await self.ask(owner, "GET", f"/v1/videos/{video['id']}")).raise_for_status().json()
            self.ended.add(video["id"])


async def run(stack: str, config: Config, fleet: Fleet, external: dict[str, Any], options: argparse.Namespace) -> None:
    """Try one stack: return its row of the table, and print what was hit on standard error."""
    rng = random.Random(options.seed)
    store = JobStore.of(config)
    await store.start()
    keys = [await store.keys.create(f"client {n}", ("create", "read")) for n in range(OWNERS)]
    await store.close()
    await fleet.start()
    try:
        load = Load(fleet.urls, [text for _, text in keys])
        open_jobs = asyncio.Semaphore(OPEN)
        began = time.monotonic()
        jobs = [asyncio.create_task(load.job(number, open_jobs)) for number in range(options.jobs)]
        hits = await hurt(fleet, external, options.faults, rng, jobs)
        _, late = await asyncio.wait(jobs, timeout=SETTLE_S)
        seconds = time.monotonic() - began
        for task in late:
            task.cancel()
        for task in jobs:
            if task.done() and not task.cancelled():
                task.result()
        print(f"{stack}: hit {dict(hits)}", file=sys.stderr, flush=True)
        found = await judge(config, load, [key.id for key, _ in keys], options.jobs)
        print(f"| {stack} | {options.jobs} | {sum(hits.values())} | {seconds:.0f} | {found} |", flush=True)
    finally:
        fleet.stop()


async def hurt(
    fleet: Fleet, external: dict[str, Any], faults: int, rng: random.Random, jobs: list[asyncio.Task[None]]
) -> Counter[str]:
    """Kill one thing after the other, at random moments, and return how often each was hit."""
    hits: Counter[str] = Counter()
    kinds = ["gateway", "dispatcher", *external]
    healing: list[asyncio.Task[None]] = []
    plan = [kinds[index % len(kinds)] for index in range(faults)]
    rng.shuffle(plan)
    while plan:
        await asyncio.sleep(rng.uniform(0.3, 1.5))
        if all(task.done() for task in jobs):
            print(f"no job was left for {len(plan)} faults", file=sys.stderr)
            break
        kind = plan.pop()
        try:
            if kind in external:
                await asyncio.gather(*healing)  # one server at a time, so that jobs go on in between
                healing = [asyncio.create_task(outage(external[kind], rng.uniform(0.5, 4)))]
            else:
                fleet.kill(kind, rng)
        except LookupError:
            plan.insert(0, kind)
            continue
        hits[kind] += 1
    await asyncio.gather(*healing)
    return hits


async def outage(server: Any, seconds: float) -> None:
    """Kill a server, and start it again."""
    await asyncio.to_thread(server.kill if isinstance(server, Server) else server.stop)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.start)


async def judge(config: Config, load: Load, owners: list[str], jobs: int) -> str:
    """Return the columns of the table."""
    storage = Storage(config.storage_options)
    await asyncio.sleep(3 * config.dispatcher.late_outputs_s)  # what superseded runs left is removed by then
    async with _store(config) as store, store.database.read() as session:
        rows = {job.id: job for job in await session.scalars(select(Job))}
        charges = {usage.job_id: usage.gpu_seconds for usage in await session.scalars(select(Usage))}
    lost = [n for n in load.made if n not in rows]
    lost += [n for n, job in rows.items() if job.status == "failed" and n not in load.cancelled]
    # What was completed costs the seconds of its denoising; a row can be there once only.
    wrong_charge = [
        n for n, j in rows.items() if j.status == "completed" and charges.get(n) != j.timings["denoise"] * j.ranks
    ]
    stuck = [name for name, job in rows.items() if not job.finished]
    doubled = len(rows) - jobs
    for name, job in rows.items():
        kept = {key.split("/")[2] for key in await storage.list(f"videos/{name}")}
        wanted = {str(job.attempt)} if job.status == "completed" else set()
        doubled += len(kept - wanted)
        if wanted - kept:
            lost.append(name)
    wrong = sum(rows[name].owner != owners[owner] for name, owner in load.made.items() if name in rows)
    for owner in range(OWNERS):
        strangers = [name for name, other in load.made.items() if other != owner][:5]
        for name in strangers:
            wrong += (await load.ask(owner, "GET", f"/v1/videos/{name}")).status_code != 404
    for what, names in (("lost", lost), ("stuck", stuck), ("charged wrong", wrong_charge)):
        for name in names:
            reason = f"{rows[name].error_code}: {rows[name].error_message}" if name in rows else "no row"
            print(f"{what}: {name}: {reason}", file=sys.stderr)
    counts = Counter(job.status for job in rows.values())
    return (
        f"{len(set(lost))} | {doubled} | {len(wrong_charge)} | {len(stuck)} | {wrong} "
        f"| {counts['completed']} | {counts['failed']}"
    )


@asynccontextmanager
async def _store(config: Config) -> AsyncIterator[JobStore]:
    store = JobStore.of(config)
    await store.start()
    yield store
    await store.close()


if __name__ == "__main__":
    main()
