"""Kinds of GPUs, by the names that `wan-serve plan --gpu` takes: memory, arithmetic and links.

Numbers are the makers', dense and without sparsity; memory is what the driver reports of such a card.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from serve_app.errors import ConfigError

HERE = "here"
"""Name of the GPUs of this machine."""

_SMI = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_SMI_S = 10


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Attributes:
        name: as `--gpu` takes it.
        label: as people say it.
        memory_bytes: all memory, as the driver reports it.
        peak_tflops: dense bfloat16 products with sums in float32, TFLOP/s.
        rate_tflops: what a compiled forward pass of A14B reaches on one such card, TFLOP/s.
        link_gbs: between cards of one host, GB/s in one direction: NVLink, else PCIe.
        host_gbs: between the card and pinned host memory, GB/s.
        measured: whether `rate_tflops` is measured (benchmarks/LEADERBOARD.md), else it is a share of the peak.
        fallback: whether `name` is none that is known, so that only the memory counts.
    """

    name: str
    label: str
    memory_bytes: int
    peak_tflops: float
    rate_tflops: float
    link_gbs: float
    host_gbs: float
    measured: bool = False
    fallback: bool = False

    @property
    def gb(self) -> float:
        """Memory in GB, 10^9 bytes."""
        return self.memory_bytes / 1e9


_OTHERS = 0.6
"""Share of the peak that is assumed of a card that was not measured. Wan2.2's authors give times for an A100,
by which it is 0.61."""


def _card(name: str, label: str, mib: int, peak: float, link_gbs: float, host_gbs: float, rate: float = 0) -> Card:
    return Card(name, label, mib * 2**20, peak, rate or _OTHERS * peak, link_gbs, host_gbs, rate > 0)


CARDS = {
    card.name: card
    for card in (
        _card("a100-40", "A100 40 GB", 40960, 312, 300, 25),
        _card("a100-80", "A100 80 GB", 81920, 312, 300, 25),
        _card("l40s", "L40S 48 GB", 46068, 362, 25, 25),
        _card("rtx-4090", "RTX 4090 24 GB", 24564, 165, 25, 25),
        _card("rtx-5090", "RTX 5090 32 GB", 32607, 210, 50, 50),
        _card("h100-80", "H100 80 GB", 81559, 989, 450, 50, rate=700),
        _card("h200", "H200 141 GB", 143771, 989, 450, 50, rate=708),
        _card("b200", "B200 180 GB", 183359, 2250, 900, 50),
    )
}
"""All kinds that are known, by name."""

_KNOWN_AS = (
    (r"B200", "b200"),
    (r"H200", "h200"),
    (r"H100", "h100-80"),
    (r"A100.*40", "a100-40"),
    (r"A100", "a100-80"),
    (r"L40S", "l40s"),
    (r"RTX 5090", "rtx-5090"),
    (r"RTX 4090", "rtx-4090"),
)


def card(name: str) -> Card:
    """Return a kind of GPU by name; `here` is that of this machine.

    Raises:
        ConfigError: there is none of that name, or this machine has no GPU.
    """
    if name == HERE:
        found = this_machine()
        if not found:
            raise ConfigError(
                f"--gpu has value '{HERE}', expected one of {', '.join(CARDS)}: this machine has no NVIDIA GPU"
            )
        return min(found, key=lambda one: one.memory_bytes)
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    alias = {"h100": "h100-80", "a100": "a100-80", "4090": "rtx-4090", "5090": "rtx-5090"}.get(wanted, wanted)
    if alias in CARDS:
        return CARDS[alias]
    close = get_close_matches(wanted, CARDS, 1)
    instead = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(CARDS)}, {HERE}"
    raise ConfigError(f"--gpu has value {name!r}, {instead}")


def this_machine() -> list[Card]:
    """Return the NVIDIA GPUs of this machine, as the driver's own program lists them; none where there is no driver."""
    try:
        said = subprocess.run(_SMI, capture_output=True, text=True, timeout=_SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return listed(said)


def listed(said: str) -> list[Card]:
    """Return the GPUs that lines of name and MiB name, as `nvidia-smi` prints them."""
    found = []
    for line in said.splitlines():
        name, _, mib = line.rpartition(",")
        if not mib.strip().isdigit():
            continue
        known = next((CARDS[key] for pattern, key in _KNOWN_AS if re.search(pattern, name)), None)
        found.append(_with_memory(known, name.strip(), int(mib)))
    return found


def named_by_ray(resources: Iterable[str]) -> Card | None:
    """Return the kind of GPU that a host of Ray names as a resource, `accelerator_type:H100`; None if it names none.

    Where a name does not tell how much memory the card has, it is the larger one.
    """
    for name in resources:
        kind = name.removeprefix("accelerator_type:")
        if kind != name:
            key = next((key for pattern, key in _KNOWN_AS if re.search(pattern, kind)), None)
            return None if key is None else CARDS[key]
    return None


def _with_memory(known: Card | None, label: str, mib: int) -> Card:
    """Return a card of this memory: a partition of a GPU, or another version of it, has less than the card by name."""
    if known is not None:
        return Card(**{**vars(known), "memory_bytes": mib * 2**20})
    # Of an unknown card only the memory is sure. Its times are taken from the slowest one that is known.
    slowest = min(CARDS.values(), key=lambda one: one.rate_tflops)
    named = {"name": label, "label": label, "memory_bytes": mib * 2**20, "measured": False, "fallback": True}
    return Card(**{**vars(slowest), **named})
