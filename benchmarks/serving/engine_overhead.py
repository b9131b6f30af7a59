"""Costs of the engine beside the steps: its own time, saved states, and cancelled samples.

    python -m benchmarks.serving.engine_overhead [--tensor-parallel 1 2] [--residents 1 8 16 32 64]

Overhead is what the coordinator measures around the forward passes: choosing, calling the ranks, telling the listeners.
All of its samples are 64x64, 9 frames; where one at a time steps, it has another shape than the rest.

A save's cost is from the time per step of equal samples with and without a place to save to, in short turns; cancelling
is timed from the call until every rank says that it holds no sample, at random moments of a step, by asking again and
again. Both with the default clip.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.serving.engine_throughput import Application, deployed, own_ray
from serve_app.engine.sample_request import SampleRequest
from serve_app.engine.saver import Saver
from serve_app.stages.encoder import Encoded
from serve_app.storage import Storage
from serve_app.wan.sampling.sample import Sample
from serve_app.wan.sampling.snapshot import to_bytes
from serve_app.wan.text import Embedding
from serve_app.wan.weights.checkpoint import Checkpoint

SMALL = {"width": 64, "height": 64, "num_frames": 9}
FIRST = {"width": 64, "height": 48, "num_frames": 9}
"""Less work than SMALL, so it leads; another shape, so it steps alone."""
STEPS = 2000
"""More than are done here: samples are cancelled."""
SAVE_EVERY_S = 0.5
USUAL_SAVE_S = 30.0


class Holder:
    """Keeps samples in the engine until they are cancelled.

    Args:
        app: the deployed application.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self._denoiser = app.handle("Denoiser").options(stream=True)
        params = app.params(1)
        self._encoded: Encoded = app.handle("Encoder").encode.remote(params.prompt, params.negative_prompt).result()
        self._count = 0

    def describe(self) -> dict[str, Any]:
        told: dict[str, Any] = self._app.handle("Denoiser").describe.remote().result()
        return told

    @contextmanager
    def resident(self, *samples: dict[str, Any], save_under: str | None = None) -> Iterator[list[Any]]:
        """Hold these samples in the engine, after their first step, inside the block.

        Yields:
            Their responses.
        """
        responses, threads = [], []
        for fields in samples:
            self._count += 1
            params = self._app.params(self._count, num_inference_steps=STEPS, **fields)
            prefix = None if save_under is None else f"{save_under}/{self._count}"
            request = SampleRequest(f"sample{self._count}", params, state_prefix=prefix)
            responses.append(self._denoiser.denoise.remote(request, self._encoded))
            threads.append(threading.Thread(target=_listen, args=(responses[-1],), daemon=True))
            threads[-1].start()
        self.until(lambda told: told["resident"] == len(samples))
        began = self.describe()["steps"]
        self.until(lambda told: told["steps"] >= began + 3)
        try:
            yield responses
        finally:
            for response in responses:
                response.cancel()
            self.until(lambda told: told["resident"] == 0)
            for thread in threads:
                thread.join(30)

    def until(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 60) -> None:
        """Ask until the answer is yes."""
        deadline = time.monotonic() + timeout_s
        while not condition(told := self.describe()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not so after {timeout_s} s: {told}")

    def watch(self, seconds: float) -> tuple[float, float, float]:
        """Return the milliseconds of a step on the ranks and around them, and the samples that each advanced.

        All are means over some time, and at least ten steps.
        """
        before = self.describe()
        time.sleep(seconds)
        self.until(lambda told: told["steps"] >= before["steps"] + 10)
        after = self.describe()
        steps = after["steps"] - before["steps"]
        on_ranks, around, advanced = (after[key] - before[key] for key in ("step_s", "overhead_s", "advanced"))
        return 1e3 * on_ranks / steps, 1e3 * around / steps, advanced / steps


def _listen(response: Any) -> None:
    try:
        for _ in response:
            pass
    except Exception as error:  # cancelled, by us
        if "ancel" not in f"{type(error)} {error}":
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--residents", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=3, help="each measurement of the overhead")
    parser.add_argument("--turns", type=int, default=8, help="with and without saving, each")
    parser.add_argument("--cancels", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0, help="denoiser.threads")
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    parser.add_argument(
        "--quick", action="store_true", help="1 and 16 samples at tensor parallel 2, little of the rest"
    )
    options = parser.parse_args()
    if options.quick:
        options.tensor_parallel, options.residents = [2], [1, 16]
        options.seconds, options.turns, options.cancels = 1, 1, 5
    print(f"\n{describe()}", flush=True)
    with own_ray():
        for size in options.tensor_parallel:
            stage = {
                "parallel": {"tensor": size},
                "threads": options.threads,
                "samples_per_step": 4,
                "resident_samples": max(64, *options.residents),
                "max_ongoing_requests": 2 * max(64, *options.residents),
                "batch": {"size": 16, "wait_s": 0.01},
                "checkpoint_s": SAVE_EVERY_S,
            }
            limits = {"pixels": 1 << 20, "num_frames": 81, "num_inference_steps": STEPS}
            with deployed(options.config, denoiser=stage, limits=limits) as app:
                holder = Holder(app)
                overhead(holder, size, options)
                saving(holder, app, size, options.turns)
                cancelling(holder, size, options.cancels)


def overhead(holder: Holder, size: int, options: argparse.Namespace) -> None:
    """Print the overhead by number of samples inside."""
    print(f"\nTensor parallel {size}: overhead, {options.seconds:g} s each\n")
    print("| samples inside | of a step | on the ranks ms | overhead ms | overhead / step |")
    print("|---|---|---|---|---|", flush=True)
    for count in options.residents:
        for samples in ([FIRST, *[SMALL] * (count - 1)], [SMALL] * count)[: 1 if count == 1 else 2]:
            with holder.resident(*samples):
                on_ranks, around, advanced = holder.watch(options.seconds)
            share = around / (on_ranks + around)
            print(f"| {count} | {advanced:.1f} | {on_ranks:.1f} | {around:.2f} | {share:.1%} |", flush=True)


def saving(holder: Holder, app: Application, size: int, turns: int) -> None:
    """Print what a save costs."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    saves = steps = 0
    for turn in range(turns):
        for save in (False, True) if turn % 2 == 0 else (True, False):
            with holder.resident({}, save_under="saved" if save else None):
                before = holder.describe()
                seen = _written(app, 3.0)
                after = holder.describe()
            done = after["steps"] - before["steps"]
            busy = sum(after[key] - before[key] for key in ("step_s", "overhead_s"))
            spent[save].append(busy / done)
            if save:
                saves, steps = saves + seen, steps + done
    without, with_saves = (statistics.fmean(spent[save]) for save in (False, True))
    cost_s = (with_saves - without) * steps / max(1, saves)
    cpu_s = _save_alone(app)
    print(f"\nTensor parallel {size}: saving, {turns} turns of 3 s each, {saves} saves in {steps} steps\n")
    print(
        "| ms a step without | with | with / without | ms a save | one in 30 s | CPU ms of a save alone | one in 30 s |"
    )
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {1e3 * without:.1f} | {1e3 * with_saves:.1f} | {with_saves / without:.3f} | {1e3 * cost_s:.1f} "
        f"| {cost_s / USUAL_SAVE_S:.2%} | {1e3 * cpu_s:.1f} | {cpu_s / USUAL_SAVE_S:.3%} |",
        flush=True,
    )


def _written(app: Application, seconds: float) -> int:
    """Return how many states are written within some time; each replaces the one before."""
    folder = Path(app.config.storage_url) / "saved"
    found = {path.name for path in folder.glob("*/*.safetensors")}
    new = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        now = {path.name for path in folder.glob("*/*.safetensors")}
        new += len(now - found)
        found |= now
        time.sleep(0.1)
    return new


def _save_alone(app: Application, count: int = 20) -> float:
    """Return the CPU seconds of a save that replaces another: the most that other work can lose by it."""
    checkpoint = Checkpoint(app.config.model.folder)
    width = checkpoint.expert_config("transformer")["text_dim"]
    text = Embedding(torch.randn(64, width), tokens=64, truncated=False)
    sample = Sample.start(app.params(1), checkpoint, text, text, torch.device("cpu"), torch.float32)
    for _ in range(3):  # the sampler's history is full then
        sample.apply(torch.randn_like(sample.latents))
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Storage(folder))
        for step in (0, 1):
            began = time.process_time()
            for number in range(count):
                frozen = sample.snapshot()
                saver.save(f"alone/{number}", step, functools.partial(to_bytes, frozen, checkpoint.revision))
            while {path.name[:5] for path in Path(folder).glob("alone/*/*")} != {f"{step:05d}"} or (
                len(list(Path(folder).glob("alone/*/*.safetensors"))) < count
            ):
                time.sleep(0.2)
            spent = time.process_time() - began
    return spent / count


def cancelling(holder: Holder, size: int, count: int) -> None:
    """Print how long it takes until a cancelled sample is gone."""
    source = random.Random(0)
    seconds, step_s = [], 0.0
    with holder.resident({}):
        on_ranks, around, _ = holder.watch(2)
    step_s = (on_ranks + around) / 1e3
    asking = time.monotonic()
    for _ in range(10):
        holder.describe()
    asking = (time.monotonic() - asking) / 10
    for _ in range(count):
        with holder.resident({}) as (response,):
            time.sleep(source.uniform(0, step_s))
            began = time.monotonic()
            response.cancel()
            holder.until(lambda told: all(rank["samples"] == 0 for rank in told["ranks"]))
            seconds.append(time.monotonic() - began)
    print(f"\nTensor parallel {size}: cancelling, {count} times; asking takes {1e3 * asking:.0f} ms\n")
    print("| a step ms | gone after, median ms | 90th percentile | longest | longest / a step |")
    print("|---|---|---|---|---|")
    milliseconds = sorted(1e3 * s for s in seconds)
    high = milliseconds[-(-9 * count // 10) - 1]
    print(
        f"| {1e3 * step_s:.0f} | {statistics.median(milliseconds):.0f} | {high:.0f} | {milliseconds[-1]:.0f} "
        f"| {milliseconds[-1] / 1e3 / step_s:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
