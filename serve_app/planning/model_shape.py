"""The shape of the model that is planned for: that of a folder, or the published one where there is no folder yet.

Needs no torch, and reads no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

from serve_app.wan.cost import latent_tokens
from serve_app.wan.weights.checkpoint import Checkpoint
from serve_app.wan.weights.cut import rank_bytes
from serve_app.wan.weights.tensors import ExpertConfig, Shapes, TextConfig, VaeConfig

PUBLISHED = "the published configuration of Wan2.2-T2V-A14B"
"""The source of a shape that no folder was read for."""

_UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_DECODER = ("decoder.", "post_quant_conv.")


@dataclass(frozen=True)
class ExpertBytes:
    """Bytes of an expert's weights on one rank: of all its blocks, of one of them, and outside of blocks."""

    blocks: float
    block: float
    outside: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.blocks + self.outside


@dataclass(frozen=True)
class ModelShape:
    """The configurations of a model's components.

    Attributes:
        experts: of each expert, the high-noise one first.
        text: of the text encoder.
        vae: of the VAE.
        source: where they are from, in words.
    """

    experts: tuple[ExpertConfig, ...]
    text: TextConfig
    vae: VaeConfig
    source: str
    _known: dict[tuple[int, int, int], ExpertBytes] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def published(cls) -> Self:
        """Return the shape of Wan2.2-T2V-A14B."""
        return cls((ExpertConfig(), ExpertConfig()), TextConfig(**_UMT5_XXL), VaeConfig(), PUBLISHED)  # type: ignore[arg-type]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Return the shape of a folder, whose headers were found to have exactly these tensors."""
        experts = tuple(checkpoint.expert_shape(name) for name in checkpoint.experts)
        return cls(experts, checkpoint.text, checkpoint.vae, str(checkpoint.folder))

    @property
    def expert(self) -> dict[str, Any]:
        """The configuration of an expert, as `serve_app.wan.cost` takes it."""
        return self.experts[0].model_dump()

    @property
    def is_a14b(self) -> bool:
        """True if the experts have the shape for which times were measured."""
        return all(one == ExpertConfig() for one in self.experts) and self.vae.base_dim == VaeConfig().base_dim

    def tokens(self, width: int, height: int, frames: int) -> int:
        """Return the number of tokens of a sample of this size in pixels."""
        return latent_tokens(self.expert, latent_shape(width, height, frames))

    def expert_bytes(self, index: int, itemsize: int, tensor: int) -> ExpertBytes:
        """Return the bytes of an expert's weights on one rank.

        Args:
            index: 0 for the high-noise expert, 1 for the low-noise one.
            itemsize: size in bytes of a number of `model.dtype`.
            tensor: ranks that share the weights.
        """
        found = self._known.get((index, itemsize, tensor))
        if found is None:  # a thousand names, and a plan asks for each of some dozens of layouts
            config = self.experts[index]
            sizes = rank_bytes(config.tensors(), itemsize, tensor)
            blocks = sum(size for name, size in sizes.items() if name.startswith("blocks."))
            found = ExpertBytes(blocks, blocks / config.num_layers, sum(sizes.values()) - blocks)
            self._known[index, itemsize, tensor] = found
        return found

    def text_encoder_bytes(self, itemsize: int) -> float:
        """Return the bytes of the text encoder's weights."""
        return _numbers(self.text.tensors()) * itemsize

    def vae_bytes(self, itemsize: int) -> float:
        """Return the bytes of the VAE's decoder half, the only one that is loaded."""
        return _numbers({n: shape for n, shape in self.vae.tensors().items() if n.startswith(_DECODER)}) * itemsize


def latent_shape(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """Return frames, height and width of the latents of a video of this size in pixels."""
    return (frames - 1) // 4 + 1, height // 8, width // 8


def _numbers(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
