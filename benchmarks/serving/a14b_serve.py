"""One A14B job at a time through HTTP, and where its seconds go.

    python -m benchmarks.serving.a14b_serve [--config configs/a14b-2xh200.yaml] [--sizes 832x480 1280x720]
                                            [--steps 4 40] [--texts TEXT ...] [--set SECTION.OPTION=VALUE ...]

brings the configuration up on a Ray of its own, with random weights of A14B's exact shapes, and prints for each job the
seconds of: waiting in the queue, encoding, each step on the ranks, the engine between steps, handing over between the
stages, decoding, and writing and storing the files; then the same for a job of 40 steps, by the measured step, where
it had fewer. A share of it is outside of the models: all but encoding, steps and decoding. Half of the steps are made
by each expert. What a text holds moves a step by some per cent where power limits the card, so --texts gives others.
`--set denoiser.profile=DIR` has the ranks write what kernels each step consists of.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import yaml
from ray import serve

from benchmarks.machine import describe
from benchmarks.model import dummy_checkpoint as dummy_checkpoint
from benchmarks.serving.engine_throughput import sections
from serve_app.launch.address import free_port
from serve_app.server import Server

WHOLE = 40
"""Steps of a job as it is meant."""
_NARROW = {
    "expert": {"num_attention_heads": 4, "attention_head_dim": 24, "ffn_dim": 192, "text_dim": 64},
    "text": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "vae": {"base_dim": 8, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1},
}
_NO_GPU = (
    "encoder.resources={num_cpus: 0.1, num_gpus: 0}",
    "denoiser.rank={num_cpus: 0.1, num_gpus: 0}",
    "denoiser.coordinator_cpus=0.1",
    "decoder.resources={num_cpus: 0.1, num_gpus: 0}",
    "decoder.devices=1",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/a14b-2xh200.yaml"))
    parser.add_argument("--sizes", nargs="+", default=["832x480", "1280x720"])
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, nargs="+", default=[4], help="of each size, or of all")
    parser.add_argument("--texts", nargs="+", default=[""], help="prompt and negative prompt of each job, or of all")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.OPTION=VALUE", help="other options")
    parser.add_argument("--narrow", action="store_true", help="small models, to see it run")
    options = parser.parse_args()
    os.environ["WAN_SERVE_BENCHMARK"] = "1"
    cuda = torch.cuda.is_available()
    print(f"\n{describe()}; {torch.cuda.get_device_name() if cuda else 'cpu'}; {options.config}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        small: dict[str, dict[str, Any]] = _NARROW if options.narrow else {"expert": {}, "text": {}, "vae": {}}
        folder = dummy_checkpoint.write(
            work / "model", {**small["expert"], "num_layers": options.layers}, small["text"], small["vae"]
        )
        # Warm-up is at the default size.
        first = dict(zip(("width", "height"), options.sizes[-1].split("x"), strict=True))
        defaults = [f"defaults.{key}={value}" for key, value in {**first, "num_frames": options.frames}.items()]
        settings = [*([] if cuda else _NO_GPU), *defaults, f"model.path={folder}", "model.weights=random", *options.set]
        file = _file(options.config, work, settings)
        with Server(file, port=free_port(), own_ray=True, dashboard=False, say=print) as server:
            started = time.perf_counter()
            server.wait_ready()
            print(f"\nready after {time.perf_counter() - started:.1f} s", flush=True)
            jobs = len(options.sizes)
            counts, texts = (one * jobs if len(one) == 1 else one for one in (options.steps, options.texts))
            _show(
                [
                    _job(server, size, options.frames, steps, text)
                    for size, steps, text in zip(options.sizes, counts, texts, strict=True)
                ]
            )


def _file(config: Path, work: Path, settings: list[str]) -> Path:
    """The configuration with some options changed, for this run alone."""
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    args = content["applications"][0]["args"]
    for section, changes in sections(settings).items():
        args[section] = {**args.get(section, {}), **changes}
    args["home"] = str(work / "home")
    for application in content["applications"]:
        application["args"] = args
        application["runtime_env"] = {"env_vars": {"WAN_SERVE_BENCHMARK": "1"}}
    file = work / "serve.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return file


def _engine() -> dict[str, Any]:
    """Seconds of all steps on the ranks so far, and of all that was around them; how often a rank's allocator gave
    memory back to ask anew; and the seconds of each of the latest steps, of the denoiser that made most of them."""
    names = [name for name in serve.status().applications["wan"].deployments if name.endswith("Denoiser")]
    found = [serve.get_deployment_handle(name, "wan").describe.remote().result() for name in names]
    retries = sum(rank["retries"] for one in found for rank in one["ranks"])
    return {
        "steps": sum(one["step_s"] for one in found),
        "engine": sum(one["overhead_s"] for one in found),
        "retries": retries,
        "latest": max(found, key=lambda one: one["steps"])["latest_s"],
    }


def _job(server: Server, size: str, frames: int, steps: int, text: str) -> dict[str, Any]:
    width, height = map(int, size.split("x"))
    before = _engine()
    request = {
        "prompt": text or "A cat walks on the grass, realistic style",
        "seed": 1,
        "num_frames": frames,
        "num_inference_steps": steps,
        "size": f"{width}x{height}",
        # Half of the steps for each expert: at shift 1 timesteps are evenly spaced.
        "flow_shift": 1.0,
        "boundary_ratio": 0.5,
        **({"negative_prompt": text} if text else {}),
    }
    with httpx.Client(base_url=server.url, timeout=600) as http:
        began = time.perf_counter()
        video = http.post("/v1/videos", json=request).raise_for_status().json()
        with http.stream("GET", f"/v1/videos/{video['id']}/events") as events:
            for _ in events.iter_lines():  # up to the end of the video
                pass
        video = http.get(f"/v1/videos/{video['id']}").raise_for_status().json()
        assert video["status"] == "completed", video
        http.get(f"/v1/videos/{video['id']}/content", follow_redirects=True).raise_for_status()
        total = time.perf_counter() - began
    after = _engine()
    told = video["timings"]
    step_s, engine_s = (after[key] - before[key] for key in ("steps", "engine"))
    job = {
        "size": size,
        "made": steps,
        "retries": after["retries"] - before["retries"],
        "total": total,
        "queue": total - told["total"],
        "encode": told["encode"],
        "steps": step_s,
        "engine": engine_s,
        "hand-over": told["total"] - told["encode"] - step_s - engine_s - told["decode"] - told["store"],
        "decode": told["decode"],
        "files": told["store"],
        "each": after["latest"][-steps:],
    }
    print(json.dumps(job), flush=True)
    return job


def _show(jobs: list[dict[str, Any]]) -> None:
    parts = ("queue", "encode", "steps", "engine", "hand-over", "decode", "files")
    print(f"\n| size | steps | {' | '.join(parts)} | total s | outside of the models |")
    print("|---|---|" + "---|" * (len(parts) + 2))
    for job in jobs:
        for count in sorted({job["made"], WHOLE}):
            # The engine's loop turns once a step; all else is there once a job.
            scaled = {part: job[part] * (count / job["made"] if part in ("steps", "engine") else 1) for part in parts}
            total = sum(scaled.values())
            outside = total - scaled["encode"] - scaled["steps"] - scaled["decode"]
            numbers = " | ".join(f"{scaled[part]:.3f}" for part in parts)
            print(f"| {job['size']} | {count} | {numbers} | {total:.2f} | {100 * outside / total:.2f} % |")
    for job in jobs:
        print(f"\n{job['size']}: memory was given back and asked for anew {job['retries']} times")
        print(f"{job['size']}, seconds of each step on the ranks: {', '.join(f'{one:.3f}' for one in job['each'])}")


if __name__ == "__main__":
    main()
