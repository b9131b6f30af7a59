"""The plan against what was measured: memory of each row of the results, and the seconds in which a plan is made.

    python -m benchmarks.model.planning [--rounds 5]

Prints the errors of the memory model over all rows of `benchmarks/results` that were measured on H100s and H200s, and
how long `wan-serve plan` takes as a process of its own, without a GPU and without weights.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

from benchmarks.machine import describe
from tests.support.memory_rows import OF_DECODES, OF_RANKS, decode, peaks, reserved

_PLANS = (
    ("--gpu", "h100-80", "--gpus", "8"),
    ("--gpu", "rtx-4090", "--size", "832x480"),
    ("--gpu", "h200", "--gpus", "2"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{describe()}\n\n| what | numbers | median error | largest | of |\n|---|---|---|---|---|")
    _errors("peak of a rank", [(ours, seen, line.key) for line in OF_RANKS for _, ours, seen in peaks(line)])
    held = [line for line in OF_RANKS if "reserved GB" in line.cells]
    _errors("held by the allocator of a rank", [(*reserved(line), line.key) for line in held])
    _errors("peak of a decode", [(*decode(line), line.key) for line in OF_DECODES])
    print("\n| command | s, median | lowest | highest | CPU s, median |\n|---|---|---|---|---|")
    for plan in _PLANS:
        seconds = [_seconds(plan) for _ in range(rounds)]
        wall, cpu = [one for one, _ in seconds], statistics.median(one for _, one in seconds)
        numbers = " | ".join(f"{one:.2f}" for one in (statistics.median(wall), min(wall), max(wall), cpu))
        print(f"| `wan-serve plan {' '.join(plan)}` | {numbers} |", flush=True)


def _errors(what: str, found: list[tuple[float, float, str]]) -> None:
    errors = sorted(((abs(ours / seen - 1), ours / seen - 1, key) for ours, seen, key in found), reverse=True)
    (_, most, key), middle = errors[0], statistics.median(error for error, _, _ in errors)
    print(f"| {what} | {len(errors)} | {100 * middle:.1f} % | {100 * most:+.1f} % | {key.replace(' | ', ', ')} |")


def _seconds(plan: tuple[str, ...]) -> tuple[float, float]:
    """Return the seconds of a plan, and those of CPUs."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "serve_app.cli", "plan", *plan], check=True, capture_output=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
