"""What serving costs: one default job through HTTP against one bare WanPipeline call, alternated in one run.

    python -m benchmarks.serving.serving_tax [--pairs 10] [--tensor-parallel 1 2]

Both use the same folder, prompt, seed and parameters; each has the machine to itself while it runs. The job's time is
from sending the request to having the mp4, polling as often as the server asks for; the call's time ends with frames
in memory (it writes no file).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import torch
import yaml
from diffusers import UniPCMultistepScheduler, WanPipeline

from benchmarks.machine import describe
from serve_app.cli.client import poll_after_s
from serve_app.config import Config
from serve_app.launch.address import free_port
from serve_app.server import Server

PROMPT = "A red circle moves to the right on a white background"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pairs", type=int, default=10)
    arguments.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    options = arguments.parse_args()
    print(f"\n{describe()}; {options.pairs} pairs\n", flush=True)
    print("| tensor parallel | bare call s | through HTTP s | ratio, median | lowest | highest |")
    print("|---|---|---|---|---|---|", flush=True)
    for size in options.tensor_parallel:
        bare, served = measure(options.config, size, options.pairs)
        ratios = sorted(s / b for b, s in zip(bare, served, strict=True))
        print(
            f"| {size} | {statistics.median(bare):.2f} | {statistics.median(served):.2f} "
            f"| {statistics.median(ratios):.3f} | {ratios[0]:.3f} | {ratios[-1]:.3f} |",
            flush=True,
        )


def measure(file: Path, tensor_parallel: int, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each bare call and each served job, in pairs."""
    with tempfile.TemporaryDirectory() as home:
        content = yaml.safe_load(file.read_text())
        content["applications"][0]["args"]["home"] = home
        content["applications"][0]["args"]["denoiser"]["parallel"] = {"tensor": tensor_parallel}
        for application in content["applications"]:
            application["args"] = content["applications"][0]["args"]
        path = Path(home) / "serve.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True))
        with Server(path, port=free_port(), own_ray=True, dashboard=False) as server:
            server.wait_ready()
            pipeline = load(server.config)
            call(pipeline, server.config)
            bare, served = [], []
            for _ in range(pairs):
                bare.append(call(pipeline, server.config))
                served.append(request(server.url))
    return bare, served


def load(config: Config) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(config.model.folder, dtype=torch.float32)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, flow_shift=config.defaults.flow_shift
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: WanPipeline, config: Config) -> float:
    defaults = config.defaults
    started = time.perf_counter()
    pipeline(
        prompt=PROMPT,
        negative_prompt=defaults.negative_prompt,
        width=defaults.width,
        height=defaults.height,
        num_frames=defaults.num_frames,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        guidance_scale_2=defaults.guidance_scale_2,
        generator=torch.Generator("cpu").manual_seed(1),
    )
    return time.perf_counter() - started


def request(url: str) -> float:
    started = time.perf_counter()
    with httpx.Client(base_url=url, timeout=60) as http:
        video = http.post("/v1/videos", json={"prompt": PROMPT, "seed": 1}).raise_for_status().json()
        pause_s = 0.2
        while video["status"] not in ("completed", "failed"):
            time.sleep(pause_s)
            response = http.get(f"/v1/videos/{video['id']}").raise_for_status()
            video, pause_s = response.json(), poll_after_s(response)
        assert video["status"] == "completed", video
        http.get(f"/v1/videos/{video['id']}/content").raise_for_status()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
