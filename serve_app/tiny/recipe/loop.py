"""Parts that both training commands share: a wall-clock budget, the learning rate that follows it, EMA, and the log.

Knows nothing of models or data. The schedule follows minutes, not steps, because a command must end in time on
whatever machine it runs; a resumed command continues where the minutes of the earlier ones ended.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Budget:
    """The wall-clock minutes of a command, and its place in a plan of several commands."""

    def __init__(self, minutes: float, spent: float = 0.0, plan: float | None = None) -> None:
        self.start = time.monotonic()
        self.minutes, self.spent = minutes, spent
        self.plan = max(plan or 0.0, spent + minutes)

    @property
    def used(self) -> float:
        """Minutes since this command began."""
        return (time.monotonic() - self.start) / 60

    @property
    def done(self) -> bool:
        """True if the minutes are used up."""
        return self.used >= self.minutes

    @property
    def progress(self) -> float:
        """Share of the whole plan, 0 to 1."""
        return min(1.0, (self.spent + self.used) / self.plan)


def learning_rate(progress: float, step: int, peak: float, warmup: int = 100, floor: float = 0.01) -> float:
    """Return the learning rate: a linear warm-up over steps, then a cosine over the plan.

    The warm-up counts from a resume too, since a resumed optimiser starts without moments.
    """
    return peak * min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class Ema:
    """An exponential moving average of parameters. A young average uses a shorter window."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.live = parameters
        self.mean = [p.detach().clone().float() for p in parameters]
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the live weights to the average."""
        self.updates += 1
        keep = min(self.decay, self.updates / (self.updates + 10))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged weights; call it twice to get back."""
        for p, m in zip(self.live, self.mean, strict=True):
            keep = p.detach().clone()
            p.copy_(m)
            m.copy_(keep)


class Log:
    """Rows of numbers, printed as they come and kept as JSON for the plot."""

    def __init__(self, path: Path, rows: list[dict[str, Any]] | None = None) -> None:
        self.path, self.rows = path, rows or []

    def add(self, **row: Any) -> None:
        """Add a row, and print it."""
        self.rows.append(row)
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    def save(self) -> None:
        """Write all rows to the file."""
        self.path.write_text(json.dumps(self.rows))


def pick_device(name: str | None) -> torch.device:
    """Return the device of that name; None means CUDA if there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def to_bytes(clips: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to uint8, so that tens of thousands of frames stay on the device."""
    return ((clips + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(clips: Tensor) -> Tensor:
    """Convert uint8 to floats in [-1, 1]."""
    return clips.float() / 127.5 - 1
