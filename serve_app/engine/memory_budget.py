"""The memory of a rank on its device, checked before anything is loaded.

Imports torch where it is used, as `rank` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve_app.config import Config
from serve_app.errors import ConfigError
from serve_app.planning.memory import RankMemory, Size
from serve_app.planning.model_shape import ModelShape
from serve_app.planning.shortfall import does_not_fit
from serve_app.wan.parallel.mesh import Mesh

if TYPE_CHECKING:
    import torch

    from serve_app.wan.offload.block_swap import BlockSwap
    from serve_app.wan.weights.checkpoint import Checkpoint, Expert


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
        held = tuple(checkpoint.experts.index(name) for name in experts)
        self.memory = RankMemory(config, ModelShape.of(checkpoint), mesh, held)

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights that are on the device at once without offload."""
        return self.memory.weight_bytes

    def check_fits(self, limit: float) -> None:
        """Check that the weights and a step of the default size fit, with the text K/V cache.

        Args:
            limit: bytes of the device that the rank may use.

        Raises:
            ConfigError: they do not.
        """
        need = self.memory.need(Size.of(self._config.defaults))
        if need.least > limit:
            raise ConfigError(does_not_fit(need, limit, "this GPU"))

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
        store = FileBlocks(device) if stage.offload == "disk" else HostBlocks(device)
        return BlockSwap(device, store, stage.resident_blocks, self.memory.block_budget(limit))
