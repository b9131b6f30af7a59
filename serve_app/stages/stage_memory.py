"""The memory of a stage that is one process, on each of its devices, beside what the plan gives it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from serve_app.config import Config
from serve_app.device_memory import host_limit, measure
from serve_app.planning.memory import Size, decoder_need, encoder_need
from serve_app.planning.model_shape import ModelShape
from serve_app.planning.parts import total

if TYPE_CHECKING:
    import torch

    from serve_app.config import DecoderConfig, EncoderConfig
    from serve_app.planning.parts import ProcessMemory
    from serve_app.wan.weights.checkpoint import Checkpoint


class StageMemory:
    """The memory of the text encoder or the decoder.

    Args:
        kind: `encoder` or `decoder`.
        config: the deployment's configuration.
        checkpoint: the model's folder.
        devices: where it computes.
        modules: its modules, one for each device, whose parameters are its weights.
    """

    def __init__(
        self, kind: str, config: Config, checkpoint: Checkpoint, devices: Sequence[torch.device], modules: Sequence[Any]
    ) -> None:
        self._kind = kind
        self._stage: EncoderConfig | DecoderConfig = config.encoder if kind == "encoder" else config.decoder
        need = _NEEDS[kind](config, ModelShape.of(checkpoint))
        self._planned = total(need.parts or need.host)
        self._devices = devices
        self._weights = [float(sum(p.nbytes for p in module.parameters())) for module in modules]

    def plain(self) -> dict[str, Any]:
        """Return kind and memory as plain values, as `StatusBoard` takes them."""
        memory = [
            measure(device, self._limit(device), {"weights": weights}, self._planned).plain()
            for device, weights in zip(self._devices, self._weights, strict=True)
        ]
        return {"kind": self._kind, "memory": memory}

    def _limit(self, device: torch.device) -> float:
        if device.type != "cuda":
            return host_limit(self._stage.memory_fraction, 1)
        import torch

        return float(self._stage.memory_fraction * torch.cuda.get_device_properties(device).total_memory)


_NEEDS: dict[str, Callable[[Config, ModelShape], ProcessMemory]] = {
    "encoder": lambda config, model: encoder_need(config, model, config.encoder.batch.size),
    "decoder": lambda config, model: decoder_need(config, model, Size.of(config.defaults), math.inf),
}
