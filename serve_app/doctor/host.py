"""One host's own report: versions, disks, GPUs and weights, collected where they are."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from serve_app import __version__
from serve_app.doctor.gpus import Gpu, GpusSick, gpus
from serve_app.doctor.weights import Fingerprints, fingerprints

_PACKAGES = ("ray", "torch", "diffusers", "transformers", "deepspeed", "safetensors", "numpy", "sqlalchemy", "obstore")


@dataclass(frozen=True)
class Question:
    """A question to a host.

    Attributes:
        folders: folders with weights; none if they are not looked at.
        whole: read all bytes of the weights.
        disks: folders whose free space matters.
    """

    folders: list[str] = field(default_factory=list)
    whole: bool = False
    disks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HostReport:
    """A host's answer about itself.

    Attributes:
        host: its name.
        versions: version of each package that shapes results, or that hosts exchange data with.
        disks: free and all bytes of the disk of each folder.
        gpus: its GPUs.
        sick: why its GPUs cannot be asked; empty if they can.
        weights: fingerprints of its weights.
    """

    host: str
    versions: dict[str, str]
    disks: dict[str, tuple[int, int]]
    gpus: list[Gpu]
    sick: str
    weights: Fingerprints


class HostProbe:
    """Answers for its host; a Ray actor on each, or a plain object for this machine."""

    def clock(self) -> float:
        """Return the host's time in seconds since the epoch."""
        return time.time()

    def report(self, question: Question) -> HostReport:
        """Return what the host says of itself."""
        sick = ""
        found: list[Gpu] = []
        try:
            found = gpus()
        except GpusSick as error:
            sick = str(error)
        return HostReport(
            host=socket.gethostname(),
            versions=_versions(),
            disks={folder: _disk(folder) for folder in (tempfile.gettempdir(), *question.disks)},
            gpus=found,
            sick=sick,
            weights=fingerprints([Path(folder) for folder in question.folders], question.whole),
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "serve_app": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _disk(folder: str) -> tuple[int, int]:
    """Return free and all bytes of the disk that holds a folder, or will hold it."""
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    usage = shutil.disk_usage(os.fspath(place))
    return usage.free, usage.total
