"""Jobs made at once against bare WanPipeline calls one after the other, on the same cores, alternated in one run.

    python -m benchmarks.serving.engine_throughput [--at-once 1 2 4 8] [--tensor-parallel 1 2] [--clips default preview]

A job is the whole of it on both sides: text encoding, denoising, VAE and a written mp4 (served jobs also write a
thumbnail and a sprite sheet). Of N bare calls half run before the N jobs and half after. Prompts and seeds differ from
job to job. Where the machine has other work, the seconds of all its processors say more than the time.

`--set denoiser.samples_per_step=4 decoder.threads=1` changes options of the deployment; `--or` with other ones compares
them, each to the bare calls beside it.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import yaml
from diffusers import WanPipeline
from ray import serve

from benchmarks.machine import describe
from benchmarks.model.parity import arguments
from benchmarks.serving.serving_tax import load
from serve_app.app import wan
from serve_app.config import Config, validate
from serve_app.events import Done
from serve_app.job_spec import JobSpec
from serve_app.request import Params, VideoRequest, resolve
from serve_app.wan.video import write_mp4

CLIPS: dict[str, dict[str, Any]] = {"default": {}, "preview": {"width": 64, "height": 64, "num_frames": 9}}
"""Fields of a request by name."""
SETTINGS: list[str] = []
"""Options that differ from the configuration file unless the command line says otherwise."""


class Application:
    """The deployed `wan` application.

    Args:
        config: what it was deployed with.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.pipeline = serve.get_app_handle("wan").options(stream=True)
        self._jobs = 0

    def handle(self, deployment: str) -> Any:
        return serve.get_deployment_handle(deployment, "wan")

    def params(self, number: int, **fields: Any) -> Params:
        """Return the parameters of the request with this number: no two have the same prompt or seed."""
        colour = ("red", "green", "blue", "yellow")[number % 4]
        way = ("left", "right", "up", "down")[number // 4 % 4]
        prompt = f"A {colour} circle moves {way} on a white background, take {number}"
        return resolve(VideoRequest(prompt=prompt, seed=number, **fields), self.config)

    def make(self, params: Params) -> Done:
        """Run one job through all stages."""
        self._jobs += 1
        name = f"video_{self._jobs}"
        job = JobSpec(name, params, f"videos/{name}/1")
        events = list(self.pipeline.generate.remote(job))
        assert isinstance(events[-1], Done), events
        return events[-1]


@contextmanager
def own_ray() -> Iterator[None]:
    """Start a Ray of its own, with more CPUs than the machine has, so that placement is never the obstacle."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(
        address="local",
        num_cpus=16,
        namespace="serve",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def deployed(file: Path, **sections: dict[str, Any]) -> Iterator[Application]:
    """Deploy the `wan` application of a configuration file, some options changed, for the time of the block."""
    args = yaml.safe_load(file.read_text(encoding="utf-8"))["applications"][0]["args"]
    for section, options in sections.items():
        args[section] = {**args.get(section, {}), **options}
    with tempfile.TemporaryDirectory() as home:
        args["home"] = home
        serve.run(wan(args), name="wan", route_prefix=None)
        try:
            yield Application(validate(args))
        finally:
            serve.delete("wan")


def sections(settings: list[str]) -> dict[str, dict[str, Any]]:
    """Return `["denoiser.threads=1", ...]` as a mapping of sections."""
    content: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        section, _, option = key.partition(".")
        content.setdefault(section, {})[option] = yaml.safe_load(value)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clips", nargs="+", choices=CLIPS, default=list(CLIPS))
    parser.add_argument("--jobs", type=int, default=2, help="at least so many of each, previews eight times as many")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="SECTION.OPTION=VALUE", help="options of the deployment"
    )
    parser.add_argument("--or", nargs="*", action="append", default=[], help="others, to be compared", dest="others")
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    parser.add_argument("--quick", action="store_true", help="previews at 1 and 8 only, tensor parallel 1")
    options = parser.parse_args()
    if options.quick:
        options.at_once, options.tensor_parallel, options.clips, options.jobs = [1, 8], [1], ["preview"], 1
    torch.set_num_threads(os.cpu_count() or 1)
    print(f"\n{describe()}; at least {options.jobs} jobs, {8 * options.jobs} previews\n", flush=True)
    print(
        "| options | tensor parallel | clip | at once | bare s | served s | ratio | lowest | highest | CPU s of each |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with own_ray():
        for settings in ([*SETTINGS, *options.set], *([*SETTINGS, *other] for other in options.others)):
            name = ", ".join(settings[len(SETTINGS) :]) or "-"
            for size in options.tensor_parallel:
                changed = sections([*settings, f"denoiser.parallel={{tensor: {size}}}"])
                with deployed(options.config, **changed) as app:
                    for row in measure(app, options.clips, options.at_once, options.jobs):
                        print(f"| {name} | {size} | {row}", flush=True)


def measure(app: Application, clips: list[str], at_once: list[int], jobs: int) -> Iterator[str]:
    """Return the rows of the table, for each clip and number of jobs at once."""
    pipeline = load(app.config)
    for clip in clips:
        fields = CLIPS[clip]
        bare(pipeline, app.params(0, **fields))  # the first call of a shape is slow, on both sides
        app.make(app.params(0, **fields))
        for count in at_once:
            pairs, cpu = [], [0.0, 0.0]
            for _ in range(max(1, jobs * (8 if clip == "preview" else 1) // count)):
                spent = [cpu_seconds()]
                before = sum(bare(pipeline, app.params(n, **fields)) for n in range(count // 2))
                spent.append(cpu_seconds())
                served = at_the_same_time(app, [app.params(n, **fields) for n in range(count)])
                spent.append(cpu_seconds())
                after = sum(bare(pipeline, app.params(n, **fields)) for n in range(count // 2, count))
                spent.append(cpu_seconds())
                pairs.append((before + after, served))
                cpu = [cpu[0] + spent[1] - spent[0] + spent[3] - spent[2], cpu[1] + spent[2] - spent[1]]
            ratios = sorted(calls / served for calls, served in pairs)
            calls_s, served_s = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = f"{statistics.median(ratios):.2f} | {ratios[0]:.2f} | {ratios[-1]:.2f}"
            used = " / ".join(f"{seconds / len(pairs):.1f}" for seconds in cpu)
            yield f"{clip} | {count} | {calls_s:.2f} | {served_s:.2f} | {ratio} | {used} |"


def bare(pipeline: WanPipeline, params: Params) -> float:
    """Return the seconds of one call, with the mp4."""
    started = time.perf_counter()
    frames = pipeline(**arguments(params)).frames[0]
    with tempfile.TemporaryDirectory() as folder:
        write_mp4((frames * 255).round().astype("uint8"), Path(folder) / "video.mp4", params.fps, {})
    return time.perf_counter() - started


def cpu_seconds() -> float:
    """Return the CPU seconds of this process, where the bare calls run, and of its Ray."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def at_the_same_time(app: Application, requests: list[Params]) -> float:
    """Return the seconds from submitting all of them to the last one's files."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(requests)) as threads:
        list(threads.map(app.make, requests))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
