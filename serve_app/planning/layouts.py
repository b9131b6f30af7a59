"""The layouts for a wish: every mesh and residency of the experts that fits, and those that do not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve_app.config import Config
from serve_app.errors import ConfigError
from serve_app.planning.layout import Layout, Rejected, Wish
from serve_app.planning.memory import RankMemory, decoder_need, encoder_need, tile_bytes
from serve_app.planning.model_shape import ModelShape
from serve_app.planning.parts import ProcessMemory
from serve_app.planning.rates import Rates
from serve_app.request import Params
from serve_app.wan.parallel.mesh import AXES, Mesh

FREE = 0.1
"""Share of each GPU that no process may take: CUDA contexts, NCCL, and what drivers keep."""
_ENCODER_CPUS = 16
_RESIDENCIES = (("together", "none"), ("swap", "none"), ("split", "none"), ("swap", "cpu"))
_DRAFT = 0.01
_BLOCKS = 10  # to have on a GPU rather than the text encoder
_STEP = 200  # shares of memory are multiples of 1 / _STEP


@dataclass(frozen=True)
class _Others:
    """The stages beside the denoiser: where they are, their memory on a device, and their shares of the fullest GPU."""

    device: str
    devices: int
    parts: int
    texts: ProcessMemory
    pictures: ProcessMemory
    encoder_share: float
    decoder_share: float
    fraction: float


class Layouts:
    """All layouts for a wish.

    Attributes:
        fitting: those that fit.
        rejected: those that do not, with what they lack.
    """

    def __init__(self, wish: Wish) -> None:
        self._wish = wish
        self._rates = Rates(wish.model, wish.card)
        self.fitting: list[Layout] = []
        self.rejected: list[Rejected] = []
        self._others: dict[tuple[str, int, int], _Others] = {}
        self._drafts: dict[tuple[str, str], Config] = {}
        within = [mesh for ranks in _divisors(wish.gpus) for mesh in _meshes(ranks, wish.model)]
        self._add(within, crosses=False)
        if not self.fitting and wish.hosts > 1:  # a group crosses hosts only where none fits on one
            wider = [wish.gpus * hosts for hosts in _divisors(wish.hosts) if hosts > 1]
            self._add([mesh for ranks in wider for mesh in _meshes(ranks, wish.model)], crosses=True)

    def _add(self, meshes: list[Mesh], crosses: bool) -> None:
        for mesh, (experts, offload) in itertools.product(meshes, _RESIDENCIES):
            groups = self._wish.gpus * self._wish.hosts // mesh.ranks
            two = len(self._wish.model.experts) > 1
            if (experts == "split" and (groups < 2 or not two)) or (
                experts == "swap" and offload == "none" and not two
            ):
                continue
            if offload != "none" and any(one.mesh == mesh for one in self.fitting):
                continue  # nothing has to wait in host memory
            found = self._layout(mesh, experts, offload, groups, crosses)
            if isinstance(found, Layout):
                self.fitting.append(found)
            else:
                self.rejected.append(found)

    def _layout(self, mesh: Mesh, experts: str, offload: str, groups: int, crosses: bool) -> Layout | Rejected:
        """Return the layout with the fastest of the other stages beside which its ranks fit."""
        wish = self._wish
        held = (0,) if experts == "split" else tuple(range(len(wish.model.experts)))
        memory = RankMemory(self._draft(experts, offload), wish.model, mesh, held)
        missing = math.inf
        for wanted in (_BLOCKS, 2) if offload != "none" else (0,):
            for others in self._choices():
                room = (1 - FREE - others.fraction) * wish.card.memory_bytes
                short = self._missing(memory, room, wanted)
                if short <= 0:
                    return self._built(memory, mesh, experts, offload, groups, crosses, others, room)
                missing = min(missing, short)
        return Rejected(mesh, experts if offload == "none" else f"{experts}, offload {offload}", missing)

    def _built(
        self,
        memory: RankMemory,
        mesh: Mesh,
        experts: str,
        offload: str,
        groups: int,
        crosses: bool,
        others: _Others,
        room: float,
    ) -> Layout:
        wish = self._wish
        limit = room if offload != "none" else None
        need = memory.need(wish.size, limit)
        # Ranks get all that the other stages leave: what a step does not need is room for batch mates.
        share = math.floor(_STEP * (1 - FREE - others.fraction) + 1e-9) / _STEP
        args = self._args(mesh, experts, offload, groups, crosses, others, share)
        config = Config.model_validate(args)
        blocks, layers, passing = memory.blocks_on_device(room), wish.model.experts[0].num_layers, 0.0
        if blocks < layers:
            passing = (layers - max(0, blocks - 2)) * memory.weights[0].block
        seconds = self._rates.video_seconds(
            Params(**config.defaults.model_dump(), prompt="a plan", seed=0),
            mesh,
            passing_bytes=passing,
            decoder_devices=others.devices,
            decoder_tiles=others.parts,
            vae_dtype=config.model.vae_dtype,
            encoder_cpus=0 if others.texts.gpus else _ENCODER_CPUS,
        )
        rank, texts, pictures = (
            replace(one, fraction=getattr(config, one.option).memory_fraction)
            for one in (need, others.texts, others.pictures)
        )
        return Layout(wish, mesh, config, args, groups, rank, texts, pictures, blocks, seconds, crosses)

    def _choices(self) -> Iterator[_Others]:
        """Yield the ways in which encoder and decoder share the GPUs, the fastest ones first."""
        devices = (2, 1) if self._wish.gpus > 1 else (1,)
        for device, count, parts in itertools.product(("cuda", "cpu"), devices, (1, 2, 4, 8)):
            if (device, count, parts) not in self._others:
                self._others[device, count, parts] = self._choice(device, count, parts)
            yield self._others[device, count, parts]

    def _choice(self, device: str, devices: int, parts: int) -> _Others:
        wish = self._wish
        shares = self._shares
        config = Config.model_validate(
            {
                **{name: wish.args[name] for name in ("model",) if name in wish.args},
                "encoder": _encoder(device, shares["encoder"], _DRAFT),
                "denoiser": {"rank": {"num_gpus": shares["rank"]}, "memory_fraction": _DRAFT},
                "decoder": _decoder(devices, shares["decoder"], _DRAFT),
            }
        )
        bound = math.inf
        if parts > 1:
            itemsize = 4 if config.model.vae_dtype == "float32" else 2
            bound = tile_bytes(wish.model, wish.size, itemsize, devices) / parts
        texts, pictures = encoder_need(config, wish.model), decoder_need(config, wish.model, wish.size, bound)
        fractions = (self._fraction(texts.total), self._fraction(pictures.total))
        # With two GPUs a decoder works on its neighbour's too, so that all three kinds of processes may meet there.
        meet = self._alone or devices > 1
        return _Others(device, devices, parts, texts, pictures, *fractions, sum(fractions) if meet else max(fractions))

    @property
    def _alone(self) -> bool:
        return self._wish.gpus * self._wish.hosts == 1

    @property
    def _shares(self) -> dict[str, float]:
        """The shares of a GPU that Ray reserves, by which it places processes."""
        alone = self._alone
        return {"rank": 0.7 if alone else 0.8, "encoder": 0.1 if alone else 0.2, "decoder": 0.2}

    def _draft(self, experts: str, offload: str) -> Config:
        """Return a configuration of which the ranks' memory can be told, whatever the mesh."""
        if (experts, offload) not in self._drafts:
            others = self._choice("cpu", 1, 8)
            args = self._args(Mesh(), experts, offload, 1, False, others, _DRAFT)
            self._drafts[experts, offload] = Config.model_validate(args)
        return self._drafts[experts, offload]

    def _args(
        self,
        mesh: Mesh,
        experts: str,
        offload: str,
        groups: int,
        crosses: bool,
        others: _Others,
        share: float,
    ) -> dict[str, Any]:
        """Return the options of a layout whose ranks may take this share of a GPU's memory."""
        size, shares = self._wish.size, self._shares
        parallel = {axis: mesh.size(axis) for axis in AXES if mesh.size(axis) > 1}
        denoiser: dict[str, Any] = {
            **({"parallel": parallel} if parallel else {}),
            "rank": {"num_gpus": shares["rank"]},
            **({"experts": experts} if experts != "together" else {}),
            **({"offload": offload, "parked_memory_mib": 256} if offload != "none" else {}),
            "compile": True,
            **({"placement": "PACK"} if crosses else {}),
            "memory_fraction": share,
        }
        if experts == "split":  # two steps of three are the high-noise expert's at the published shift
            low = max(1, groups // 3)
            high = max(1, groups - low)
            denoiser["autoscaling"] = {"min_replicas": high, "max_replicas": high}
            denoiser["low_noise_autoscaling"] = {"min_replicas": low, "max_replicas": low}
        elif groups > 1:
            denoiser["autoscaling"] = {"min_replicas": groups, "max_replicas": groups}
        kept = {name: dict(value) if isinstance(value, Mapping) else value for name, value in self._wish.args.items()}
        limits = {"pixels": size.width * size.height, "num_frames": size.frames}
        defaults = {"width": size.width, "height": size.height, "num_frames": size.frames}
        return {
            **kept,
            "defaults": {**kept.get("defaults", {}), **defaults},
            "limits": {**kept.get("limits", {}), **limits},
            "encoder": _encoder(others.device, shares["encoder"], others.encoder_share),
            "denoiser": denoiser,
            "decoder": _decoder(others.devices, shares["decoder"], others.decoder_share),
        }

    def _missing(self, memory: RankMemory, room: float, blocks: int) -> float:
        """Return the bytes that a rank lacks, which wants so many blocks there, or all (0). Not above 0 if it fits."""
        if not blocks:
            return memory.need(self._wish.size).total - room
        return min(blocks, self._wish.model.experts[0].num_layers) * memory.weights[0].block - memory.block_budget(room)

    def _fraction(self, size: float) -> float:
        return min(1.0, math.ceil(_STEP * size / self._wish.card.memory_bytes) / _STEP)


def _encoder(device: str, gpus: float, share: float) -> dict[str, Any]:
    if device == "cpu":
        return {"device": "cpu", "resources": {"num_cpus": 1, "num_gpus": 0}}
    # One request at a time: each text more wants 0.2 GB.
    return {"resources": {"num_gpus": gpus}, "memory_fraction": share, "batch": {"size": 1}}


def _decoder(devices: int, gpus: float, share: float) -> dict[str, Any]:
    several = {"devices": devices} if devices > 1 else {}
    return {"resources": {"num_gpus": gpus}, **several, "memory_fraction": share}


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _meshes(ranks: int, model: ModelShape) -> list[Mesh]:
    """Return the meshes of so many ranks along which every expert can be divided."""
    found = []
    for guidance, sequence in itertools.product((2, 1), _divisors(ranks)):
        if ranks % (guidance * sequence) == 0:
            mesh = Mesh(guidance, sequence, ranks // (guidance * sequence))
            try:
                for expert in model.experts:
                    mesh.check_fits(expert.model_dump())
            except ConfigError:
                continue
            found.append(mesh)
    return found
