"""Previews and long clips arriving at random on one engine: least work first against first come, first served.

    python -m benchmarks.serving.mixed_trace [--load 0.75] [--seconds 60] [--rounds 2] [--tensor-parallel 1]

Both sides are the same deployment and the same arrivals (Poisson, by seed), alternated: ours, theirs, theirs, ours, ...
First come, first served is the engine's own rule for samples that waited too long, which all samples of that side say
they did: they go in the order in which they came, and take along equal ones as on the other side. Latency is from
asking the denoiser to its latents; texts are encoded before, and nothing is decoded, for this is about the engine.
Load is the share of the time that the engine would work if every sample had each step to itself, from the seconds that
one of each takes alone in this run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.serving.engine_throughput import Application, deployed, own_ray
from serve_app.engine.sample_request import Denoised, SampleRequest
from serve_app.stages.denoiser import Started
from serve_app.stages.encoder import Encoded

KINDS: dict[str, dict[str, Any]] = {
    "preview": {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 6},
    "long": {"num_inference_steps": 20},
}
SIDES = ("ours", "first come")


@dataclass
class Heard:
    """Seconds from asking for each sample to its latents, by kind, and errors."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    errors: list[Exception] = field(default_factory=list)


class Asker:
    """A client of the denoiser, which follows each sample by a thread.

    Args:
        app: the deployed application.
    """

    def __init__(self, app: Application) -> None:
        self._denoiser = app.handle("Denoiser").options(stream=True)
        self._params = {kind: app.params(1, **fields) for kind, fields in KINDS.items()}
        encoder = app.handle("Encoder")
        self._encoded: dict[str, Encoded] = {
            kind: encoder.encode.remote(params.prompt, params.negative_prompt).result()
            for kind, params in self._params.items()
        }
        self._count = 0

    def ask(self, kind: str, heard: Heard, created_at: float = 0.0) -> threading.Thread:
        """Ask for one sample; its latency is in `heard` when the thread has ended."""
        self._count += 1
        request = SampleRequest(f"{kind}{self._count}", self._params[kind], created_at=created_at)
        thread = threading.Thread(target=self._follow, args=(request, kind, heard), daemon=True)
        thread.start()
        return thread

    def _follow(self, request: SampleRequest, kind: str, heard: Heard) -> None:
        asked = time.monotonic()
        try:
            events = list(self._denoiser.denoise.remote(request, self._encoded[kind]))
            assert isinstance(events[0], Started) and isinstance(events[-1], Denoised), events
            heard.seconds[kind].append(time.monotonic() - asked)
        except Exception as error:
            heard.errors.append(error)

    def alone(self, kind: str, count: int) -> float:
        """Return the median seconds of one sample on an idle engine."""
        heard = Heard()
        for _ in range(count):
            self.ask(kind, heard).join()
        _check(heard)
        return statistics.median(heard.seconds[kind])

    def play(self, arrivals: list[tuple[float, str]], overdue: bool) -> Heard:
        """Ask at each of these moments (seconds from now), and wait for all."""
        heard, began, threads = Heard(), time.monotonic(), []
        for moment, kind in arrivals:
            time.sleep(max(0.0, began + moment - time.monotonic()))
            # Long ago, in the order of arrival: every turn has come.
            threads.append(self.ask(kind, heard, created_at=1.0 + moment if overdue else 0.0))
        for thread in threads:
            thread.join()
        _check(heard)
        return heard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=float, default=0.75)
    parser.add_argument("--preview-share", type=float, default=0.15, help="of the load")
    parser.add_argument("--seconds", type=float, default=60, help="of arrivals, a side and round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples-per-step", type=int, default=4)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    parser.add_argument("--quick", action="store_true", help="one round of ten seconds")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 10, 1
    denoiser = {
        "parallel": {"tensor": options.tensor_parallel},
        "samples_per_step": options.samples_per_step,
        # All are inside at once, so that the order is the engine's alone.
        "resident_samples": 256,
        "max_ongoing_requests": 512,
    }
    with own_ray(), deployed(options.config, denoiser=denoiser) as app:
        asker = Asker(app)
        for kind in KINDS:
            asker.alone(kind, 2)  # the first of a shape is slow
        alone = {kind: asker.alone(kind, 10 if kind == "preview" else 3) for kind in KINDS}
        shares = {"preview": options.preview_share, "long": 1 - options.preview_share}
        rates = {kind: options.load * shares[kind] / alone[kind] for kind in KINDS}
        heard: list[tuple[int, str, float, Heard]] = []
        for round_ in range(options.rounds):
            arrivals = poisson(rates, options.seconds, options.seed + round_)
            for side in SIDES if round_ % 2 == 0 else reversed(SIDES):
                began = time.monotonic()
                latencies = asker.play(arrivals, overdue=side == "first come")
                heard.append((round_, side, time.monotonic() - began, latencies))
    report(options, alone, rates, heard)


def poisson(rates: dict[str, float], seconds: float, seed: int) -> list[tuple[float, str]]:
    """Return moments of arrival with their kinds, in order."""
    source = random.Random(seed)
    arrivals = []
    for kind, rate in rates.items():
        moment = source.expovariate(rate)
        while moment < seconds:
            arrivals.append((moment, kind))
            moment += source.expovariate(rate)
    return sorted(arrivals)


def report(
    options: argparse.Namespace,
    alone: dict[str, float],
    rates: dict[str, float],
    heard: list[tuple[int, str, float, Heard]],
) -> None:
    """Print the table."""
    sides = {
        side: {kind: sorted(s for _, who, _, h in heard if who == side for s in h.seconds[kind]) for kind in KINDS}
        for side in SIDES
    }
    took = ", ".join(f"{side} {seconds:.0f}" for _, side, seconds, _ in heard)
    print(f"\n{describe()}; tensor parallel {options.tensor_parallel}, {options.samples_per_step} samples a step")
    print(
        f"\nLoad {options.load:.2f}, of it previews {options.preview_share:.2f}; "
        + "; ".join(f"{kind} {KINDS[kind]}: {alone[kind]:.2f} s alone, {rates[kind]:.2f} a second" for kind in KINDS)
        + f"; seed {options.seed}, {options.rounds} x {options.seconds:g} s of arrivals, played in s: {took}\n"
    )
    print("| latency | samples a side | first come, first served s | ours s | theirs / ours |")
    print("|---|---|---|---|---|")
    for name, kind, figure in (
        ("previews, median", "preview", statistics.median),
        ("previews, 95th percentile", "preview", p95),
        ("previews, mean", "preview", statistics.fmean),
        ("long clips, mean", "long", statistics.fmean),
        ("long clips, longest", "long", max),
    ):
        if not sides["ours"][kind]:
            print(f"| {name} | none came | | | |")
            continue
        ours, theirs = (figure(sides[side][kind]) for side in SIDES)
        print(f"| {name} | {len(sides['ours'][kind])} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f} |")


def p95(values: list[float]) -> float:
    """Return the 95th percentile of sorted values, by nearest rank."""
    return values[max(0, -(-len(values) * 95 // 100) - 1)]


def _check(heard: Heard) -> None:
    if heard.errors:
        raise heard.errors[0]


if __name__ == "__main__":
    main()
