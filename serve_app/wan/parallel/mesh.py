"""The mesh: three axes along which the ranks of a group divide the work of a step.

Knows sizes and indices only, neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from serve_app.config import ParallelConfig

AxisName = Literal["guidance", "sequence", "tensor"]
AXES: tuple[AxisName, ...] = get_args(AxisName)
"""The slowest-changing first: tensor parallelism talks most, so its ranks are neighbours."""


@dataclass(frozen=True)
class Mesh:
    """Sizes of the three axes; a group has as many ranks as their product.

    Attributes:
        guidance: 2 gives each half of classifier-free guidance to ranks of its own.
        sequence: ranks that share the tokens of a sample (Ulysses, https://arxiv.org/abs/2309.14509).
        tensor: ranks that share every linear layer (Megatron-LM, https://arxiv.org/abs/1909.08053).
    """

    guidance: int = 1
    sequence: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Self | None:
        """Return the mesh that `denoiser.parallel` names; None where it says only how many ranks there are."""
        return None if parallel.ranks is not None else cls(parallel.guidance, parallel.sequence, parallel.tensor)

    @property
    def ranks(self) -> int:
        """Number of ranks of the whole group."""
        return self.guidance * self.sequence * self.tensor

    def size(self, axis: AxisName) -> int:
        """Return the number of ranks along an axis."""
        size: int = getattr(self, axis)
        return size

    def index(self, axis: AxisName, rank: int) -> int:
        """Return the position of a rank along an axis, from 0."""
        return rank // self._stride(axis) % self.size(axis)

    def lines(self, axis: AxisName) -> list[list[int]]:
        """Return all sets of ranks that differ along this axis only. Each rank is in one of them, at its index."""
        steps = [self._stride(axis) * i for i in range(self.size(axis))]
        others = [[self._stride(o) * i for i in range(self.size(o))] for o in AXES if o != axis]
        return [[sum(corner) + step for step in steps] for corner in product(*others)]

    def check_fits(self, config: dict[str, Any], tensor_option: str = "denoiser.parallel.tensor") -> None:
        """Check that an expert can be divided along this mesh.

        Args:
            config: the expert's configuration.
            tensor_option: name of the option that asks for `tensor`, for the message.

        Raises:
            ConfigError: it cannot; names the option, its value and what was expected.
        """
        heads, ffn = int(config["num_attention_heads"]), int(config["ffn_dim"])
        for name, whole in (("num_attention_heads", heads), ("ffn_dim", ffn)):
            if whole % self.tensor:
                raise ConfigError(
                    f"{tensor_option} has value {self.tensor}, expected a divisor of the model's {name}, {whole}"
                )
        if heads // self.tensor % self.sequence:
            raise ConfigError(
                f"denoiser.parallel.sequence has value {self.sequence}, expected a divisor of the heads of a rank, "
                f"{heads // self.tensor} (num_attention_heads / tensor)"
            )

    def __str__(self) -> str:
        return " x ".join(f"{axis} {self.size(axis)}" for axis in AXES)

    def _stride(self, axis: AxisName) -> int:
        stride = 1
        for name in reversed(AXES):
            if name == axis:
                break
            stride *= self.size(name)
        return stride


def default_mesh(
    ranks: int,
    config: dict[str, Any],
    weight_bytes: Callable[[int], float],
    device_bytes: float,
    work_bytes: Callable[[Mesh], float] = lambda mesh: 0.0,
) -> tuple[Mesh, str]:
    """Choose the mesh for a number of ranks; returns it and the reason in words.

    Guidance parallelism comes first, since its halves meet only once a step, over the prediction. Then as much tensor
    parallelism as the weights need, since it alone makes them smaller. Then sequence parallelism, whose ranks send
    parts of the activations where those of tensor parallelism sum up all of them.

    Args:
        ranks: number of ranks.
        config: an expert's configuration.
        weight_bytes: bytes of weights that a rank holds, by the size of tensor parallelism.
        device_bytes: bytes of its device that each rank may take.
        work_bytes: bytes that a step takes beside the weights on a rank of a mesh.

    Raises:
        ConfigError: the model cannot be divided among that number of ranks.
    """
    meshes = []
    for guidance, sequence in product((2, 1), range(1, ranks + 1)):
        if ranks % (guidance * sequence) == 0:
            mesh = Mesh(guidance, sequence, ranks // (guidance * sequence))
            try:
                mesh.check_fits(config)
            except ConfigError:
                continue
            meshes.append(mesh)
    if not meshes:
        raise ConfigError(
            f"denoiser.parallel.ranks has value {ranks}, expected one that the model's "
            f"{config['num_attention_heads']} heads and feed-forward width {config['ffn_dim']} can be shared by"
        )
    fitting = [mesh for mesh in meshes if weight_bytes(mesh.tensor) + work_bytes(mesh) < device_bytes]
    # Where none fits, the most tensor parallelism comes closest; loading then says what is missing.
    chosen = (
        max(fitting, key=lambda mesh: (mesh.guidance, mesh.sequence))
        if fitting
        else max(meshes, key=lambda mesh: mesh.tensor)
    )
    gib = 2**30
    why = (
        f"{weight_bytes(1) / gib:.1f} GiB of weights, {weight_bytes(chosen.tensor) / gib:.1f} a rank, beside "
        f"{work_bytes(chosen) / gib:.1f} for a step, "
        f"{'fit' if fitting else 'do not fit'} into the {device_bytes / gib:.1f} GiB of a device that it may take; "
        "guidance before sequence, and as little tensor as that takes"
    )
    return chosen, why
