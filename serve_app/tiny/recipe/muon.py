"""The optimiser Muon for matrices: momentum, orthogonalised by Newton-Schulz, scaled like an AdamW step.

Knows nothing of the model. Matrices of one shape, or of its transpose, are stacked and orthogonalised in one batch of
three kernels a round, because a tiny model has a hundred small matrices and one call each would cost more than the
training step. Source: K. Jordan et al., "Muon: an optimizer for hidden layers" (2024); the scale
0.2 * sqrt(max(rows, columns)) is from J. Liu et al. (2025).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrices of a stack [n, rows, columns], within Muon's usual tolerance."""
    x = g.bfloat16() if g.is_cuda else g
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.mT if tall else x).to(g.dtype)


class Muon:
    """An optimiser of 2D parameters. `lr` is set before every step."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.02) -> None:
        shapes: dict[tuple[int, int], tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
        for p in parameters:
            wide_tall = shapes.setdefault((min(p.shape), max(p.shape)), ([], []))
            wide_tall[p.shape[0] > p.shape[1]].append(p)
        self.groups = list(shapes.values())
        self.buffers = [
            torch.zeros(len(wide) + len(tall), *shape, device=parameters[0].device)
            for shape, (wide, tall) in shapes.items()
        ]
        self.momentum, self.weight_decay, self.lr = momentum, weight_decay, 0.0

    @torch.no_grad()
    def step(self) -> None:
        """Do one step. Every parameter must have a gradient."""
        for (wide, tall), buffer in zip(self.groups, self.buffers, strict=True):
            parts = [torch.stack([p.grad for p in wide if p.grad is not None])] if wide else []
            parts += [torch.stack([p.grad for p in tall if p.grad is not None]).mT] if tall else []
            grad = torch.cat(parts).float()
            buffer.lerp_(grad, 1 - self.momentum)
            update = orthogonalise(grad.lerp_(buffer, self.momentum))
            # Contiguous, because the fused additions want the strides of the parameters.
            updates = [*update[: len(wide)].unbind(0), *update[len(wide) :].mT.contiguous().unbind(0)]
            torch._foreach_mul_([*wide, *tall], 1 - self.lr * self.weight_decay)
            torch._foreach_add_([*wide, *tall], updates, alpha=-self.lr * 0.2 * buffer.shape[2] ** 0.5)
