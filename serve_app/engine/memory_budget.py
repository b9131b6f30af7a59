"""Memory that a rank needs on its device, from the configuration and the weights' headers, before anything is loaded.

Imports torch where it is used, as `rank` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.config import Config
from serve_app.errors import ConfigError
from serve_app.wan.cost import activation_bytes, text_bytes
from serve_app.wan.parallel.mesh import Mesh

if TYPE_CHECKING:
    import torch

    from serve_app.wan.offload.block_swap import BlockSwap
    from serve_app.wan.weights.checkpoint import Checkpoint, Expert

_GIB = 2**30


@dataclass(frozen=True)
class _Held:
    """Bytes of an expert's weights on one rank: in its blocks, and outside of them."""

    blocks: float
    outside: float


class MemoryBudget:
    """Memory that one rank of a mesh needs.

    Args:
        config: the deployment's configuration.
        checkpoint: the model's folder.
        experts: which experts the rank holds.
        mesh: how the group's ranks share a step.

    Raises:
        CheckpointError: the folder is not a complete model.
    """

    def __init__(self, config: Config, checkpoint: Checkpoint, experts: tuple[Expert, ...], mesh: Mesh) -> None:
        self._config = config
        self._mesh = mesh
        self._shape = checkpoint.expert_config(experts[0])
        self._held = [_held(config, checkpoint, expert, mesh.tensor) for expert in experts]

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights that are on the device at once without offload."""
        blocks = [one.blocks for one in self._held]
        resident = max(blocks) if self._config.denoiser.experts == "swap" else sum(blocks)
        return resident + sum(one.outside for one in self._held)

    def check_fits(self, limit: float) -> None:
        """Check that the weights and a step of the default size fit, with the text K/V cache.

        For A14B the estimate is within 3 % of what the allocator held (benchmarks/results/2026-11-25-a14b-2xh100.md).

        Args:
            limit: bytes of the device that the rank may use.

        Raises:
            ConfigError: they do not.
        """
        defaults = self._config.defaults
        step = self._step_bytes(max(defaults.tokens, self._config.denoiser.fuse_guidance_tokens))
        stage = self._config.denoiser
        texts = text_bytes(self._shape, self._config.model.itemsize, self._mesh)
        # Each expert has its own: those of the first are still there when the second one steps.
        need = self.weight_bytes + step + len(self._held) * min(texts, stage.text_cache_mib * 2**20)
        if need > limit:
            raise ConfigError(
                f"denoiser.memory_fraction has value {stage.memory_fraction:g}, {limit / _GIB:.1f} GiB "
                f"of this GPU, expected {need / _GIB:.1f} GiB for weights ({self.weight_bytes / _GIB:.1f}) and a step "
                f"of {defaults.width}x{defaults.height}, {defaults.num_frames} frames; denoiser.experts, .offload and "
                ".parallel.tensor make it less"
            )

    def block_swap(self, limit: float, device: torch.device) -> BlockSwap | None:
        """Return where blocks take turns on the device; None where all of them stay there.

        Args:
            limit: bytes of the device that the rank may use.
            device: where the rank computes.

        Raises:
            ConfigError: not even the blocks in use fit, or without offload see `check_fits`.
        """
        from serve_app.wan.offload.block_store import FileBlocks, HostBlocks
        from serve_app.wan.offload.block_swap import BlockSwap

        stage = self._config.denoiser
        if stage.offload == "none":
            self.check_fits(limit)
            # On a CPU both experts are in host memory anyway.
            swap = stage.experts == "swap" and device.type != "cpu"
            return BlockSwap(device, HostBlocks(device)) if swap else None
        texts = stage.text_cache_mib * len(self._held)
        others = sum(one.outside for one in self._held) + (stage.parked_memory_mib + texts) * 2**20
        left = limit - others - self._step_bytes(self._config.most_tokens)
        store = FileBlocks(device) if stage.offload == "disk" else HostBlocks(device)
        return BlockSwap(device, store, stage.resident_blocks, left)

    def _step_bytes(self, tokens: int) -> int:
        config = self._config
        return activation_bytes(self._shape, tokens, config.model.itemsize, self._mesh, config.denoiser.compile)


def _held(config: Config, checkpoint: Checkpoint, expert: Expert, tensor: int) -> _Held:
    import torch

    from serve_app.wan.weights.reader import Weights
    from serve_app.wan.weights.shard_spec import held_bytes

    with Weights(checkpoint.folder / expert) as weights:
        sizes = held_bytes(weights, getattr(torch, config.model.dtype), tensor)
    blocks = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    return _Held(blocks, sum(sizes.values()) - blocks)
