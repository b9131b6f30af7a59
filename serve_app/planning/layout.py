"""A layout: a way to put a model on the GPUs of some hosts, with its memory and seconds; and one that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serve_app.config import Config
from serve_app.planning.cards import Card
from serve_app.planning.memory import PINNED, Size
from serve_app.planning.model_shape import ModelShape
from serve_app.planning.parts import GB, ProcessMemory
from serve_app.planning.rates import VideoSeconds, videos_per_hour
from serve_app.wan.parallel.mesh import Mesh

Aim = Literal["latency", "throughput"]
"""Aim of a plan: the fewest seconds for a video, or the most videos for a GPU."""


@dataclass(frozen=True)
class Wish:
    """Things that a plan is asked for.

    Attributes:
        card: kind of all GPUs.
        gpus: GPUs of each host.
        hosts: number of hosts.
        size: the largest video.
        aim: what to rank by.
        model: the model's shape.
        args: options that the plan keeps as they are, as a file's `args` have them.
    """

    card: Card
    gpus: int
    hosts: int
    size: Size
    aim: Aim
    model: ModelShape
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """A way to serve, which fits.

    Attributes:
        wish: what was asked for.
        mesh: how a group's ranks share a step.
        config, args: its configuration, as one and as plain values.
        groups: groups of all hosts, of both experts if they are split.
        rank, encoder, decoder: memory of each kind of process on one device.
        blocks: blocks of an expert that have a place on a GPU.
        seconds: of one video.
        crosses: whether a group spans hosts.
    """

    wish: Wish
    mesh: Mesh
    config: Config
    args: dict[str, Any]
    groups: int
    rank: ProcessMemory
    encoder: ProcessMemory
    decoder: ProcessMemory
    blocks: int
    seconds: VideoSeconds
    crosses: bool

    @property
    def experts(self) -> str:
        """Residency of the experts, in a word or two."""
        stage = self.config.denoiser
        return f"{stage.experts}, {self.blocks} blocks" if stage.offload != "none" else stage.experts

    @property
    def at_once(self) -> int:
        """Videos that are made at once, one by each group or pair of groups."""
        return self.groups // 2 if self.config.denoiser.experts == "split" else self.groups

    @property
    def per_hour(self) -> float:
        """Videos an hour on all hosts."""
        return videos_per_hour(self.at_once, self.seconds.total)

    @property
    def per_gpu(self) -> float:
        """Videos an hour for each GPU of the hosts, whether it works or not."""
        return self.per_hour / (self.wish.gpus * self.wish.hosts)

    @property
    def host_bytes(self) -> float:
        """Bytes of host memory of the fullest host, beside libraries."""
        encoder = sum(part.bytes for part in self.encoder.host)
        return self.rank.bytes_of(PINNED) * self.wish.gpus + encoder


@dataclass(frozen=True)
class Rejected:
    """A way to serve that does not fit.

    Attributes:
        mesh: how a group's ranks would share a step.
        experts: residency of the experts.
        missing: bytes of each GPU that it lacks.
    """

    mesh: Mesh
    experts: str
    missing: float

    def __str__(self) -> str:
        return f"{self.mesh}, experts {self.experts}: {self.missing / GB:.1f} GB missing on a GPU"
