"""Jobs under random faults on a cluster of several hosts: is any lost, wrong, or made twice, and how long is each away?

    sudo python -m benchmarks.faults.chaos [--jobs 60] [--faults 30] [--seed 0] [--only "rank killed"]

Needs what `cluster.dev` needs for network namespaces, and redis-server. Jobs of several kinds (lengths, sizes,
languages, classes, seeds) are kept in the queue; a fault strikes at random moments, one after the other, each once the
last one is mended and some job has made progress since. Every video is compared with that of an undisturbed run of the
same request, which it must equal to the bit: no forward pass is shared here. Prints markdown tables.

How long a job is away has two parts: until the first job that lost its attempt is in a group again, and then until its
own turn comes among the others, by class and work left.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np

from benchmarks.faults.strikes import FAULTS, strike
from benchmarks.machine import describe
from cluster.dev import Cluster
from tests.support.random_checkpoint import write
from tests.support.serving import QUICK, Serving

KINDS: list[dict[str, Any]] = [
    {"prompt": "a red circle", "seed": 1, "num_inference_steps": 120},
    {"prompt": "蓝色的正方形", "seed": 2, "num_inference_steps": 100, "priority": "interactive"},
    {"prompt": "a green star", "seed": 3, "num_inference_steps": 60, "num_frames": 33, "priority": "batch"},
    {"prompt": "黄色的三角形向上移动", "seed": 4, "num_inference_steps": 110, "width": 96},
    {"prompt": "a red circle", "seed": 5, "num_inference_steps": 120, "guidance_scale": 6.0},
    {"prompt": "two stars", "seed": 6, "num_inference_steps": 120, "guidance_scale": 1.0},
]


@dataclass
class Struck:
    """A fault, and the seconds from it to the next step of each job that was being denoised then."""

    name: str
    at: float
    steps: dict[str, tuple[int, int]]
    """Attempt and step of each job that was being denoised."""
    attempts: dict[str, int]
    """Attempt of each job that was open."""
    back: dict[str, float] = field(default_factory=dict)
    first: float | None = None
    """Seconds until any of the open jobs was in a group with a later attempt."""

    def resumed(self, videos: dict[str, dict[str, Any]]) -> bool:
        """Return whether any of the open jobs is, or was, in a group with a later attempt."""
        return any(
            videos[name]["attempts"] > attempt and videos[name]["stage"] != "encode" and videos[name]["step"]
            for name, attempt in self.attempts.items()
        )


class Jobs:
    """The jobs as the server describes them, asked again and again."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self.kinds: dict[str, int] = {}
        self.now: dict[str, dict[str, Any]] = {}

    def create(self, kind: int) -> None:
        """Submit a job, and ask again while the server is away."""
        # Whether a request whose answer was lost took effect is unknown; such a job would show as one too many.
        while True:
            try:
                video = self.serving.create(**KINDS[kind])
                break
            except (httpx.HTTPError, AssertionError):
                time.sleep(0.5)
        self.kinds[video["id"]] = kind
        self.now[video["id"]] = video

    def look(self) -> bool:
        """Ask for all jobs that have not ended; return False if the server did not answer."""
        for name in [name for name, video in self.now.items() if video["status"] not in ("completed", "failed")]:
            try:
                answer = httpx.get(f"{self.serving.url}/v1/videos/{name}", timeout=5)
            except httpx.HTTPError:
                return False
            if answer.status_code != 200:
                return False
            self.now[name] = answer.json()
        return True

    def open(self) -> list[str]:
        """Return the jobs that have not ended."""
        return [name for name, video in self.now.items() if video["status"] not in ("completed", "failed")]

    def denoising(self) -> dict[str, tuple[int, int]]:
        """Return attempt and step of the jobs that have begun to be denoised and have steps left."""
        return {
            name: (self.now[name]["attempts"], self.now[name]["step"])
            for name in self.open()
            if self.now[name]["stage"] == "denoise" and 0 < self.now[name]["step"] < self.now[name]["steps"] - 20
        }


def frames(serving: Serving, video_id: str) -> np.ndarray:
    """Return a video's frames, [frames, height, width, 3]."""
    content = httpx.get(f"{serving.url}/v1/videos/{video_id}/content", timeout=60).raise_for_status().content
    with av.open(io.BytesIO(content)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def run(cluster: Cluster, serving: Serving, jobs: int, faults: int, seed: int, only: list[str]) -> None:
    rng = random.Random(seed)
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    references = []
    for kind, request in enumerate(KINDS):
        video = serving.wait(serving.create(**request), 300)
        assert video["status"] == "completed", video
        references.append(frames(serving, video["id"]))
        say(f"undisturbed {kind}: {video['timings']['total']:.1f} s")

    plan = only * (faults // len(only)) + rng.sample(only, faults % len(only))
    rng.shuffle(plan)
    state, submitted = Jobs(serving), 0
    struck: list[Struck] = []
    next_fault, began = time.monotonic() + 3, time.monotonic()
    mending: tuple[float, str, Any] | None = None
    progressed = True
    while submitted < jobs or state.open() or plan or mending:
        while (submitted < jobs and len(state.open()) < 6) or (plan and not state.open()):
            state.create(rng.randrange(len(KINDS)))
            submitted += 1
        state.look()
        now = time.monotonic()
        for one in struck:
            if one.first is None and one.resumed(state.now):
                one.first = now - one.at
            for name, (attempt, step) in one.steps.items():
                video = state.now[name]
                ended = video["status"] in ("completed", "failed")
                further = (video["attempts"], video["step"]) > (attempt, step) and video["stage"] != "encode"
                if name not in one.back and (ended or (further and video["step"] > 0)):
                    one.back[name] = now - one.at
                    progressed = True
                    which = f"{video['priority']}, kind {state.kinds[name]}"
                    say(f"{now - began:6.1f} s  {one.name}: {which} back after {one.back[name]:.1f}, first {one.first}")
        if mending and now >= mending[0]:
            mend = FAULTS[mending[1]].mend
            assert mend is not None
            mend(cluster, mending[2])
            mending = None
        if plan and not mending and progressed and now >= next_fault and state.denoising():
            name = plan.pop()
            hit = strike(name, cluster, rng)
            attempts = {video: state.now[video]["attempts"] for video in state.open()}
            struck.append(Struck(name, time.monotonic(), state.denoising(), attempts))
            say(f"{now - began:6.1f} s  {name}: {hit}; {len(state.open())} jobs open, {submitted} submitted")
            if FAULTS[name].mend:
                mending = (time.monotonic() + FAULTS[name].after_s, name, hit)
            # Where nobody was hit, nobody's progress can be waited for.
            next_fault, progressed = time.monotonic() + rng.uniform(4, 12), not struck[-1].steps
        time.sleep(0.1)
    report(state, struck, references, time.monotonic() - began)


def report(state: Jobs, struck: list[Struck], references: list[np.ndarray], seconds: float) -> None:
    serving = state.serving
    failed = [video for video in state.now.values() if video["status"] != "completed"]
    wrong, identical = [], 0
    for name, kind in state.kinds.items():
        if state.now[name]["status"] == "completed":
            same = np.array_equal(frames(serving, name), references[kind])
            identical += same
            wrong += [] if same else [name]
    time.sleep(3)
    listed = httpx.get(f"{serving.url}/v1/videos", params={"limit": 100}, timeout=30).json()["data"]
    known = {*state.kinds}
    extra = [video["id"] for video in listed if video["id"] not in known][len(references) :]
    kept = {name: [p.name for p in (serving.folder / "home/videos/videos" / name).glob("*")] for name in state.kinds}
    twice = [name for name, attempts in kept.items() if len(attempts) > 1]
    print(f"{len(state.now)} jobs, {len(struck)} faults, {seconds:.0f} s, {describe()}\n")
    print("| jobs lost | videos wrong | identical | duplicates | attempts in all |")
    print("|---|---|---|---|---|")
    attempts = sum(video["attempts"] for video in state.now.values())
    print(f"| {len(failed)} | {len(wrong)} | {identical} | {len(extra) + len(twice)} | {attempts} |\n")
    for video in failed:
        print(f"lost: {video['id']} {video['error']}")
    by_name: dict[str, list[Struck]] = defaultdict(list)
    for one in struck:
        by_name[one.name].append(one)
    print("Seconds from the blow to the next step of a job that was being denoised then:\n")
    print("| fault | times | first lost attempt resumed, median | worst | jobs hit | each, median | worst |")
    print("|---|---|---|---|---|---|---|")
    for name in FAULTS:
        waits = [wait for one in by_name[name] for wait in one.back.values()]
        firsts = [one.first for one in by_name[name] if one.first is not None]
        if waits:
            first, each = (
                f"{statistics.median(seconds):.1f} | {max(seconds):.1f}" if seconds else "- | -"
                for seconds in (firsts, waits)
            )
            print(f"| {name} | {len(by_name[name])} | {first} | {len(waits)} | {each} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    options = parser.parse_args()
    labels = {1: {"pool": "gpu"}, 2: {"pool": "gpu"}}
    with (
        tempfile.TemporaryDirectory() as name,
        Cluster(3, cpus=8, labels=labels, redis="auto", config=QUICK, say=lambda line: None) as cluster,
    ):
        folder = Path(name)
        changes: dict[str, dict[str, Any]] = {
            "denoiser": {
                "parallel": {"tensor": 2},
                "threads": 1,
                "rank": {"num_cpus": 0.2, "labels": {"pool": "gpu"}},
                "checkpoint_s": 1,
                "samples_per_step": 1,
                "health_check_timeout_s": 10,
            },
            "dispatcher": {"lease_s": 6, "retry_s": 1},
        }
        serving = Serving(cluster, folder, write(folder / "checkpoint"), changes)
        try:
            serving.wait_ready()
            run(cluster, serving, options.jobs, options.faults, options.seed, options.only)
        finally:
            serving.stop()


if __name__ == "__main__":
    main()
