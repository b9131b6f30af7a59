"""The equipment of a finisher: the machine, and the files of its operator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Equipment:
    """The machine and the files of its operator that steps may use.

    Attributes:
        threads: most threads at work on one video; 0 is one for each core that the process may use.
        device: where operator's models run, as torch names it: `cpu`, `cuda`, `cuda:1`.
        upscalers: files of upscaling models by name.
        interpolators: files of interpolation models by name.
        certificate: PEM file with the chain of certificates that signs C2PA manifests, the signer's first; None signs
            nothing.
        private_key: PEM file of its key.
        timestamp_url: time-stamping authority whose word goes into manifests; empty is none.
        font: TrueType file for visible marks; None is a built-in font with Latin letters only.
    """

    threads: int = 0
    device: str = "cpu"
    upscalers: Mapping[str, Path] = field(default_factory=dict)
    interpolators: Mapping[str, Path] = field(default_factory=dict)
    certificate: Path | None = None
    private_key: Path | None = None
    timestamp_url: str = ""
    font: Path | None = None

    @property
    def workers(self) -> int:
        """Number of threads, with 0 resolved."""
        if self.threads:
            return self.threads
        # macOS has no affinity.
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
