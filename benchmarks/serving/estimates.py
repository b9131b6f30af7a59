"""Errors of the time estimates that videos are created with: jobs of mixed sizes and classes on one tiny server.

    python -m benchmarks.serving.estimates [--warm-up 20] [--jobs 40] [--load 0.7] [--seed 0]

The first jobs teach the server its speed and are not counted. Jobs arrive at random (Poisson, by seed) at a share of
the rate that the warm-up reached. An estimate is made once, when a job is created; whatever comes later is in the
error. Both columns `as created` are the errors that `/v1/models` reports.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.machine import describe
from benchmarks.ports import free_port
from serve_app.db.tables import Job
from serve_app.jobs.store import JobStore
from serve_app.server import Server

SIZES: tuple[dict[str, Any], ...] = (
    {"size": "64x64", "num_frames": 9, "num_inference_steps": 6},
    {"size": "64x64", "num_frames": 17, "num_inference_steps": 12},
    {"size": "96x96", "num_frames": 17, "num_inference_steps": 12},
    {"size": "128x128", "num_frames": 17, "num_inference_steps": 16},
)
CLASSES = ("interactive", "standard", "standard", "batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as home:
        content = yaml.safe_load(options.config.read_text())
        args = content["applications"][0]["args"]
        args["home"] = home
        for application in content["applications"]:
            application["args"] = args
        path = Path(home) / "serve.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True))
        with (
            Server(path, port=free_port(), own_ray=True, dashboard=False) as server,
            httpx.Client(base_url=server.url) as http,
        ):
            server.wait_ready()
            began = time.monotonic()
            play(http, draw, options.warm_up, pause_s=0.0)
            between_s = (time.monotonic() - began) / options.warm_up / options.load
            ids = play(http, draw, options.jobs, between_s)
            (model,) = http.get("/v1/models").json()["data"]
        jobs = asyncio.run(read(f"sqlite:///{home}/jobs.db", ids))
    report(options, between_s, jobs, model["estimates"])


def play(http: httpx.Client, draw: random.Random, count: int, pause_s: float) -> list[str]:
    """Create jobs, one after a random pause each, wait until all have ended, and return their ids."""
    ids = []
    for nth in range(count):
        fields = {**draw.choice(SIZES), "priority": draw.choice(CLASSES), "seed": nth}
        answer = http.post("/v1/videos", json={"prompt": "a red circle moves to the right", **fields}, timeout=60)
        answer.raise_for_status()
        ids.append(answer.json()["id"])
        time.sleep(draw.expovariate(1 / pause_s) if pause_s else 0.0)
    for video_id in ids:
        while (video := http.get(f"/v1/videos/{video_id}", timeout=60).json())["status"] not in ("completed", "failed"):
            time.sleep(0.2)
        assert video["status"] == "completed", video
    return ids


async def read(url: str, ids: list[str]) -> list[Job]:
    """Return the rows of jobs."""
    store = JobStore(url)
    await store.start()
    try:
        jobs = [await store.get(video_id) for video_id in ids]
        return [job for job in jobs if job is not None]
    finally:
        await store.close()


def report(options: argparse.Namespace, between_s: float, jobs: list[Job], said: dict[str, Any] | None) -> None:
    """Print the table."""
    print(f"\n{describe()}; {options.warm_up} jobs before, one each {between_s:.2f} s, seed {options.seed}\n")
    print("| class | jobs | took s, median | error, median | error, 90th percentile | longest error s |")
    print("|---|---|---|---|---|---|")
    for name in (*dict.fromkeys(CLASSES), "all"):
        some = [job for job in jobs if name in ("all", job.priority) and job.predicted_s and job.completed_at]
        took = [(job.completed_at or 0.0) - job.created_at for job in some]
        off = [abs((job.predicted_s or 0.0) - seconds) for job, seconds in zip(some, took, strict=True)]
        shares = sorted(error / seconds for error, seconds in zip(off, took, strict=True))
        p90 = shares[-(-9 * len(shares) // 10) - 1]
        print(
            f"| {name} | {len(some)} | {statistics.median(took):.2f} | {statistics.median(shares):.1%} "
            f"| {p90:.1%} | {max(off):.2f} |"
        )
    print(f"\n`/v1/models` says: {said}\n")


if __name__ == "__main__":
    main()
