"""A plan: the layouts that fit, ranked, the one that is picked and why, and what does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve_app.errors import ConfigError
from serve_app.planning.layout import Layout, Rejected, Wish
from serve_app.planning.layouts import FREE, Layouts
from serve_app.planning.memory import PINNED
from serve_app.planning.parts import GB, Part, ProcessMemory

_RESIDENCY = ("together", "swap", "split")


@dataclass(frozen=True)
class Plan:
    """A ranked plan.

    Attributes:
        wish: what was asked for.
        layouts: those that fit, the best first.
        rejected: those that do not.
    """

    wish: Wish
    layouts: tuple[Layout, ...]
    rejected: tuple[Rejected, ...]

    @classmethod
    def of(cls, wish: Wish) -> Plan:
        """Make the plan for a wish.

        Raises:
            ConfigError: nothing fits; the message says by how many GB, and which options make less of it.
        """
        found = Layouts(wish)
        if not found.fitting:
            nearest = min(found.rejected, key=lambda one: one.missing)
            raise ConfigError(
                f"--gpu has value {wish.card.name!r} with --gpus {wish.gpus}, expected more memory for videos of "
                f"{wish.size}: the nearest is {nearest}; --size and --frames make it less"
            )
        rejected = tuple(sorted(found.rejected, key=lambda one: one.missing))
        return cls(wish, tuple(sorted(found.fitting, key=_rank)), rejected)

    @property
    def pick(self) -> Layout:
        """The layout that is taken."""
        return self.layouts[0]

    def reasons(self) -> list[str]:
        """Return sentences on why the pick is as it is."""
        pick, wish, mesh = self.pick, self.wish, self.pick.mesh
        aim = "takes the fewest seconds for a video" if wish.aim == "latency" else "makes the most videos for each GPU"
        lines = [f"Of {len(self.layouts)} layouts that fit, it {aim}."]
        if mesh.guidance > 1:
            lines.append("Each half of guidance has ranks of its own, which meet only once a step.")
        if mesh.tensor > 1:
            lines.append(f"{mesh.tensor} ranks share the weights, and each holds a part of them.")
        if mesh.sequence > 1:
            lines.append(f"{mesh.sequence} ranks share the tokens of a video, and each holds all weights.")
        if pick.at_once > 1:
            lines.append(f"{pick.at_once} groups make a video each at the same time.")
        stage = pick.config.denoiser
        if stage.offload != "none":
            lines.append(
                f"The GPU has room for {pick.blocks} of an expert's {wish.model.experts[0].num_layers} blocks; the "
                "others come from host memory while it computes."
            )
        elif stage.experts == "swap":
            lines.append(
                "The experts take turns on each GPU, and wait in host memory "
                f"({pick.rank.bytes_of(PINNED) / GB:.0f} GB for each rank). No cost of that was measured."
            )
        elif stage.experts == "split":
            lines.append("Each expert has groups of its own, so that a GPU holds half of the weights.")
        if pick.encoder.host:
            lines.append("The text encoder runs on CPUs, which leaves its memory of the GPU to the ranks.")
        if pick.crosses:
            lines.append("A group spans hosts, since none fits on one. Their network has not been measured.")
        lines.append(f"The time is {pick.seconds.basis}.")
        return lines

    def gpu_parts(self) -> list[Part]:
        """Return how the memory of the fullest GPU is shared out, what stays free included."""
        pick, card = self.pick, self.wish.card
        alone, meet = self.wish.gpus * self.wish.hosts == 1, pick.config.decoder.devices > 1
        others = [one for one in (pick.encoder, pick.decoder) if one.gpus]
        if not alone and not meet:
            others = sorted(others, key=lambda one: -one.fraction)[:1]
        there = [pick.rank, *others]
        parts = [
            Part(f"share of the {_NAMES[one.process]} ({one.fraction:g})", one.fraction * card.memory_bytes)
            for one in there
        ]
        beside = sum(part.bytes for one in there for part in one.beside)
        rest = card.memory_bytes - sum(part.bytes for part in parts)
        return [*parts, Part("CUDA contexts and NCCL", beside), Part("free", rest - beside)]

    def placement(self) -> list[str]:
        """Return where processes are put, in sentences."""
        pick, wish = self.pick, self.wish
        each = f"{pick.groups} group{'s' if pick.groups > 1 else ''} of {pick.mesh.ranks} GPU"
        each += "s" if pick.mesh.ranks > 1 else ""
        on = "spanning hosts" if pick.crosses else "each within one host"
        lines = [f"{each}, {on}: {wish.gpus * wish.hosts} GPUs on {wish.hosts} host{'s' if wish.hosts > 1 else ''}."]
        encoder = "on CPUs of any host" if pick.encoder.host else "beside a rank on one GPU"
        devices = pick.config.decoder.devices
        decoder = "beside a rank on one GPU" if devices == 1 else f"beside ranks on {devices} GPUs of one host"
        lines.append(f"The text encoder is {encoder}, the decoder {decoder}.")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return the plan as plain values: bytes, seconds, and videos an hour."""
        return {
            "gpu": vars(self.wish.card),
            "gpus": self.wish.gpus,
            "hosts": self.wish.hosts,
            "size": vars(self.wish.size),
            "for": self.wish.aim,
            "model": self.wish.model.source,
            "reasons": self.reasons(),
            "placement": self.placement(),
            "layouts": [_layout(one) for one in self.layouts],
            "does_not_fit": [
                {"mesh": vars(one.mesh), "experts": one.experts, "missing_bytes": round(one.missing)}
                for one in self.rejected
            ],
            "memory": [_process(one) for one in (self.pick.rank, self.pick.encoder, self.pick.decoder)],
            "fullest_gpu": [{"part": one.name, "bytes": round(one.bytes)} for one in self.gpu_parts()],
            "host_bytes": round(self.pick.host_bytes),
            "free_share": FREE,
            "args": self.pick.args,
        }


_NAMES = {"rank": "rank", "encoder": "text encoder", "decoder": "decoder"}


def _rank(layout: Layout) -> tuple[float, ...]:
    """Return a key that sorts the best layout first: by the aim, then by the other one, then the simplest."""
    seconds, per_gpu = round(layout.seconds.total, 1), -round(layout.per_gpu, 2)
    by = (seconds, per_gpu) if layout.wish.aim == "latency" else (per_gpu, seconds)
    stage = layout.config.denoiser
    simple = (stage.offload != "none", _RESIDENCY.index(stage.experts), bool(layout.encoder.host))
    return (*by, *map(float, simple), float(layout.mesh.sequence > 1))


def _layout(layout: Layout) -> dict[str, Any]:
    seconds = layout.seconds
    return {
        "mesh": vars(layout.mesh),
        "experts": layout.config.denoiser.experts,
        "offload": layout.config.denoiser.offload,
        "blocks": layout.blocks,
        "groups": layout.groups,
        "encoder": "cpu" if layout.encoder.host else "gpu",
        "decoder_devices": layout.config.decoder.devices,
        "seconds": {**{name: round(value, 2) for name, value in _stages(layout).items()}, "basis": seconds.basis},
        "videos_per_hour": round(layout.per_hour, 2),
        "videos_per_hour_and_gpu": round(layout.per_gpu, 2),
        "rank_bytes": round(layout.rank.total),
    }


def _stages(layout: Layout) -> dict[str, float]:
    seconds = layout.seconds
    return {
        "total": seconds.total,
        "encode": seconds.encode,
        "denoise": seconds.denoise,
        "decode": seconds.decode,
        "other": seconds.other,
    }


def _process(need: ProcessMemory) -> dict[str, Any]:
    def plain(parts: tuple[Part, ...]) -> list[dict[str, Any]]:
        return [{"part": one.name, "bytes": round(one.bytes), "option": one.option} for one in parts]

    return {
        "process": need.process,
        "memory_fraction": need.fraction,
        "parts": plain(need.parts),
        "beside": plain(need.beside),
        "host": plain(need.host),
        "bytes": round(need.total),
    }
