"""Time of a pass by kind of kernel, from the trace of its kernels that `a14b_forward --profile` writes.

    python -m benchmarks.model.trace DIR/auto-compiled-0.json.gz ...

Kernels of several streams run beside each other, so that what they take may add up to more than the pass. `idle` is the
time in which nothing computes: no attention, product or elementwise kernel, whatever is copied or waited for meanwhile.
A second table says behind which kernel, and before which one, a device was idle for more than 30 microseconds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

_REST, _IDLE = "norms and elementwise", "idle"
_KINDS = (
    # Named after all that they feed, products and attention too.
    (_REST, r"^triton_"),
    ("attention", r"flash|fmha|cudnn.*sdpa|attention"),
    ("collectives", r"nccl"),
    ("waiting", r"symmetric_memory"),
    ("copies", r"^memcpy|^memset"),
    ("matrix products", r"gemm|nvjet|cublas|cutlass|matmul"),
)
"""Kinds of kernels by what their names hold, the first that does; others are norms, RoPE, modulation and the like."""
_COMPUTING = {_REST, "attention", "matrix products"}
_LONG_US = 30


@dataclass(frozen=True)
class Kernel:
    """A kernel or a copy on a device, from `begin` to `end` in microseconds."""

    name: str
    begin: float
    end: float

    @property
    def kind(self) -> str:
        """Return the kind of a kernel, one of `_KINDS`."""
        return next((kind for kind, names in _KINDS if re.search(names, self.name, re.IGNORECASE)), _REST)


def read(file: Path) -> list[Kernel]:
    """Return the kernels of a gzipped trace of torch's profiler, in the order in which they began."""
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        events = json.load(stream)["traceEvents"]
    kernels = [
        Kernel(event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(kernels, key=lambda one: one.begin)


def milliseconds(kernels: list[Kernel]) -> dict[str, float]:
    """Return the milliseconds of each kind, and how long nothing computes, from the first kernel to the last."""
    found: dict[str, float] = dict.fromkeys([kind for kind, _ in _KINDS], 0.0)
    for one in kernels:
        found[one.kind] += (one.end - one.begin) / 1e3
    return found | {_IDLE: sum(gap for gap, _, _ in _gaps(kernels)) / 1e3}


def span_ms(kernels: list[Kernel]) -> float:
    """Return the milliseconds from the first kernel to the last."""
    return (max(one.end for one in kernels) - kernels[0].begin) / 1e3 if kernels else 0.0


def _gaps(kernels: list[Kernel]) -> list[tuple[float, str, str]]:
    """Return the microseconds in which nothing computed, with the kernels before and after."""
    gaps, end, last = [], None, ""
    for one in kernels:
        if one.kind not in _COMPUTING:
            continue
        if end is not None and one.begin > end:
            gaps.append((one.begin - end, last, one.name))
        if end is None or one.end > end:
            end, last = one.end, one.name
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    traces = {file: read(file) for file in options.files}
    columns = [*(kind for kind, _ in _KINDS), _IDLE]
    print(f"\n| trace | pass ms | {' | '.join(f'{kind} ms' for kind in columns)} |\n|---|{'---|' * (len(columns) + 1)}")
    for file, kernels in traces.items():
        found = milliseconds(kernels)
        numbers = " | ".join(f"{found[kind]:.1f}" for kind in columns)
        print(f"| {file.name} | {span_ms(kernels):.1f} | {numbers} |")
    print("\n| trace | idle ms | times | behind | before |\n|---|---|---|---|---|")
    for file, kernels in traces.items():
        idle, times = defaultdict[tuple[str, str], float](float), Counter[tuple[str, str]]()
        for gap, last, following in _gaps(kernels):
            if gap > _LONG_US:
                idle[last, following] += gap
                times[last, following] += 1
        for (last, following), gap in sorted(idle.items(), key=lambda item: -item[1])[:5]:
            print(f"| {file.name} | {gap / 1e3:.1f} | {times[last, following]} | {last[:60]} | {following[:60]} |")


if __name__ == "__main__":
    main()
