"""The memory of each kind of process, by component, from a configuration and the shape of the model.

All other numbers on memory come from here: the plan's, the refusals of `up` and `check`, what a rank checks before it
loads, and what the monitor compares with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from serve_app.config import Config
from serve_app.planning.model_shape import ModelShape, latent_shape
from serve_app.planning.parts import Part, ProcessMemory
from serve_app.wan.cost import activation_bytes, slack_bytes, symmetric_bytes, text_bytes
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.vae.tiles import Picture, levels_of
from serve_app.wan.weights.checkpoint import MAX_TOKENS

if TYPE_CHECKING:
    from serve_app.config import Defaults, Limits
    from serve_app.request import Params

CONTEXT_BYTES = 0.75e9
"""Memory of a CUDA context with the kernels that torch loads into it, and the libraries' handles."""
NCCL_BYTES = 0.5e9
"""Buffers of NCCL for the process groups of a rank."""
TILE_SHARE = 0.67
"""Share of a GPU's free memory that the decoder gives to a tile, as `TiledDecoder` does."""
WORK_OF_TILE = {4: 1.18, 2: 1.09}
"""Factor by which a tile takes more than `Picture.tile_bytes`, for the work space of convolutions, by number size."""
_PASSING = 2
# A text in the encoder's attention: scores, their mask, their copy in float32 and its softmax.
_SCORES = 12

EXPERTS = ("high-noise expert", "low-noise expert")
BLOCKS, OUTSIDE = "blocks of the expert in use", "both experts outside of blocks"
RESIDENT = "resident blocks, and two that take turns"
TEXTS, STEP, PARKED = "keys and values of texts", "a step's activations", "parked samples"
SLACK, SYMMETRIC = "allocator slack", "memory that ranks exchange through"
CONTEXT, NCCL = "CUDA context", "NCCL"
PINNED, BUFFERS = "experts in pinned memory", "two blocks in pinned memory"


@dataclass(frozen=True)
class Size:
    """Size of a video: width and height in pixels, and frames."""

    width: int
    height: int
    frames: int

    @classmethod
    def of(cls, values: Defaults | Params) -> Self:
        """Return the size that a request's parameters, or their defaults, have."""
        return cls(values.width, values.height, values.num_frames)

    @classmethod
    def largest(cls, limits: Limits, longest: int = 16) -> Self:
        """Return a size of as many tokens as `limits` allow, in the shape of a picture of 16 to 9."""
        height = max(longest, round((limits.pixels * 9 / 16) ** 0.5 / 16) * 16)
        return cls(max(longest, limits.pixels // height // 16 * 16), height, limits.num_frames)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.frames} frames"


class RankMemory:
    """The memory of a rank of a group.

    Args:
        config: the deployment's configuration.
        model: the model's shape.
        mesh: how the group's ranks share a step.
        experts: indices of the experts that the rank holds.
    """

    def __init__(self, config: Config, model: ModelShape, mesh: Mesh, experts: tuple[int, ...]) -> None:
        self._config = config
        self._model = model
        self._mesh = mesh
        self.experts = experts
        self.weights = [model.expert_bytes(index, config.model.itemsize, mesh.tensor) for index in experts]

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights that are on the device at once without offload."""
        return sum(part.bytes for part in self._weight_parts(None))

    @property
    def text_bytes(self) -> float:
        """Bytes of the texts' keys and values, of all experts: those of the first stay while the second one steps."""
        kept = text_bytes(self._model.expert, self._config.model.itemsize, self._mesh)
        return len(self.weights) * min(kept, self._config.denoiser.text_cache_mib * 2**20)

    def step_bytes(self, tokens: int) -> int:
        """Return the bytes of a forward pass over so many tokens."""
        itemsize, compiled = self._config.model.itemsize, self._config.denoiser.compile
        return activation_bytes(self._model.expert, tokens, itemsize, self._mesh, compiled)

    def slack_bytes(self, tokens: int) -> int:
        """Return the bytes that a GPU's allocator holds beyond a pass over so many tokens."""
        return slack_bytes(self._model.expert, tokens, self._config.model.itemsize, self._mesh)

    def symmetric_bytes(self, tokens: int) -> int:
        """Return the bytes through which ranks exchange results of so many tokens; 0 where they use collectives."""
        if not self._config.denoiser.symmetric_memory:
            return 0
        return symmetric_bytes(self._model.expert, tokens, self._config.model.itemsize, self._mesh)

    def sample_bytes(self, size: Size) -> float:
        """Return the bytes of a sample between its steps: latents, the sampler's history, both texts."""
        frames, height, width = latent_shape(size.width, size.height, size.frames)
        latents = self._model.vae.z_dim * frames * height * width * 4
        return 4 * latents + 2 * MAX_TOKENS * self._model.experts[0].text_dim * self._config.model.itemsize

    def block_budget(self, limit: float) -> float:
        """Return the bytes that are left for blocks beside the largest request, where a rank may take `limit`."""
        stage, tokens = self._config.denoiser, self._config.most_tokens
        others = sum(one.outside for one in self.weights) + stage.parked_memory_mib * 2**20
        others += stage.text_cache_mib * 2**20 * len(self.weights)
        return limit - others - self.step_bytes(tokens) - self.slack_bytes(tokens) - self.symmetric_bytes(tokens)

    def blocks_on_device(self, limit: float) -> int:
        """Return the number of an expert's blocks that have a place on the device, those that take turns included."""
        layers = self._model.experts[0].num_layers
        if self._config.denoiser.offload == "none":
            return layers
        fit = max(0, int(self.block_budget(limit) // self.weights[0].block))
        wanted = self._config.denoiser.resident_blocks
        return min(layers, fit if wanted is None else wanted + _PASSING)

    def need(self, size: Size, limit: float | None = None) -> ProcessMemory:
        """Return what a rank takes for videos of this size.

        Args:
            size: of the largest video.
            limit: bytes that a rank may take, which decides how many blocks stay with offload; None is without limit.
        """
        stage = self._config.denoiser
        tokens = max(self._model.tokens(size.width, size.height, size.frames), self._fused_tokens(size))
        parked = min(stage.parked_memory_mib * 2**20, (stage.resident_samples - 1) * self.sample_bytes(size))
        size_options = "limits.pixels, limits.num_frames, denoiser.parallel"
        parts = [
            *self._weight_parts(limit),
            Part(TEXTS, self.text_bytes, "denoiser.text_cache_mib"),
            Part(STEP, self.step_bytes(tokens), size_options + ", denoiser.compile"),
            Part(PARKED, parked, "denoiser.parked_memory_mib, denoiser.resident_samples"),
            Part(SLACK, self.slack_bytes(tokens)),
        ]
        if symmetric := self.symmetric_bytes(tokens):
            parts.append(Part(SYMMETRIC, symmetric, "denoiser.symmetric_memory"))
        beside = [Part(CONTEXT, CONTEXT_BYTES)]
        if self._mesh.ranks > 1:
            beside.append(Part(NCCL, NCCL_BYTES))
        return ProcessMemory(
            "rank",
            "denoiser",
            stage.memory_fraction,
            stage.rank.num_gpus,
            tuple(parts),
            tuple(beside),
            tuple(self._host_parts()),
            f"a step of {size}",
            (PARKED,),
        )

    def _fused_tokens(self, size: Size) -> int:
        """Return the tokens of a pass in which both halves of guidance are one."""
        both = 2 * self._model.tokens(size.width, size.height, size.frames)
        fused = self._mesh.guidance == 1 and both <= self._config.denoiser.fuse_guidance_tokens
        return both if fused else 0

    def _weight_parts(self, limit: float | None) -> list[Part]:
        stage, held = self._config.denoiser, self.weights
        option = "denoiser.experts, denoiser.parallel.tensor"
        if stage.offload != "none" and limit is not None:
            blocks = self.blocks_on_device(limit) * held[0].block
            return [
                Part(RESIDENT, blocks, "denoiser.resident_blocks", True),
                Part(OUTSIDE, sum(one.outside for one in held), "", True),
            ]
        if stage.experts == "swap":
            return [
                Part(BLOCKS, max(one.blocks for one in held), "denoiser.offload, denoiser.parallel.tensor", True),
                Part(OUTSIDE, sum(one.outside for one in held), "", True),
            ]
        return [Part(EXPERTS[index], one.total, option, True) for index, one in zip(self.experts, held, strict=True)]

    def _host_parts(self) -> list[Part]:
        stage = self._config.denoiser
        if stage.offload == "disk":
            return [Part(BUFFERS, 2 * self.weights[0].block)]
        if stage.experts == "swap" or stage.offload == "cpu":
            return [Part(PINNED, sum(one.blocks for one in self.weights), "denoiser.offload: disk")]
        return []


def encoder_need(config: Config, model: ModelShape, requests: int = 1) -> ProcessMemory:
    """Return what the text encoder takes for so many requests in one batch, whose negative prompt is the same."""
    texts, itemsize, text = requests + 1, config.model.itemsize, model.text
    scores = text.num_heads * MAX_TOKENS**2 * _SCORES
    hidden = MAX_TOKENS * itemsize * (3 * text.d_ff + 4 * text.d_model)
    parts = (
        Part("text encoder", model.text_encoder_bytes(itemsize), "encoder.device", True),
        Part("a batch of texts", texts * float(scores + hidden), "encoder.batch.size"),
    )
    stage = config.encoder
    gpus = 0 if stage.device == "cpu" else stage.resources.num_gpus
    on_host = parts if stage.device == "cpu" else ()
    beside = () if stage.device == "cpu" else (Part(CONTEXT, CONTEXT_BYTES),)
    on_device = () if stage.device == "cpu" else parts
    work = f"a batch of {texts} texts"
    return ProcessMemory("encoder", "encoder", stage.memory_fraction, gpus, on_device, beside, on_host, work)


def decoder_need(config: Config, model: ModelShape, size: Size, bound: float = math.inf) -> ProcessMemory:
    """Return what the decoder takes on each of its devices.

    Args:
        config: the deployment's configuration.
        model: the model's shape.
        size: of the video.
        bound: of a tile's `Picture.tile_bytes`. Infinity is a part of the picture for each device, which is fastest; 0
            is the smallest tiles, the least that the decoder can do with.
    """
    stage, itemsize = config.decoder, 4 if config.model.vae_dtype == "float32" else 2
    tile = tile_bytes(model, size, itemsize, stage.devices, min(bound, stage.tile_memory_mib * 2**20 or math.inf))
    work = WORK_OF_TILE[itemsize] * tile
    parts = (
        Part("VAE", model.vae_bytes(itemsize), "model.vae_dtype", True),
        Part("tiles", work, "decoder.devices, decoder.tile_memory_mib"),
        Part(SLACK, tile / TILE_SHARE - work),
    )
    gpus = 0 if stage.device == "cpu" else stage.resources.num_gpus
    on_host = parts[:2] if stage.device == "cpu" else ()
    beside = () if stage.device == "cpu" else (Part(CONTEXT, CONTEXT_BYTES),)
    on_device = () if stage.device == "cpu" else parts
    return ProcessMemory(
        "decoder", "decoder", stage.memory_fraction, gpus, on_device, beside, on_host, f"a decode of {size}"
    )


def tile_bytes(model: ModelShape, size: Size, itemsize: int, devices: int = 1, bound: float = math.inf) -> float:
    """Return `Picture.tile_bytes` of the largest tile into which the decoder cuts a picture.

    Args:
        model: the model's shape.
        size: of the video.
        itemsize: size in bytes of a number of the VAE's dtype.
        devices: that share the picture.
        bound: of a tile's bytes; where none fits, the smallest tiles are taken.
    """
    _, height, width = latent_shape(size.width, size.height, size.frames)
    picture = Picture(levels_of(model.vae), height, width, 1, itemsize)
    return float(max(map(picture.tile_bytes, picture.tiles(bound, devices))))
