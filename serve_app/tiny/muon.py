"""Muon for the matrices of a transformer: momentum, orthogonalised by Newton-Schulz, scaled like an AdamW step.

Knows nothing of the model. Equal shapes are stacked and orthogonalised in one batch, because a tiny model has a
hundred small matrices and one call each would cost more than the training step. Source: K. Jordan et al., "Muon: an
optimizer for hidden layers" (2024); the scale 0.2 * sqrt(max(rows, columns)) is from J. Liu et al. (2025).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack [n, rows, columns], to within Muon's usual tolerance."""
    x = g.bfloat16() if g.is_cuda else g
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon:
    """Optimiser over 2D parameters; `lr` is set before every step."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.02) -> None:
        groups: dict[tuple[int, ...], list[Tensor]] = {}
        for p in parameters:
            groups.setdefault(tuple(p.shape), []).append(p)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.momentum, self.weight_decay, self.lr = momentum, weight_decay, 0.0

    @torch.no_grad()
    def step(self) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grad = torch.stack([p.grad for p in group if p.grad is not None]).float()
            buffer.lerp_(grad, 1 - self.momentum)
            update = orthogonalise(grad.lerp_(buffer, self.momentum))
            scale = 0.2 * max(group[0].shape) ** 0.5
            torch._foreach_mul_(group, 1 - self.lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-self.lr * scale)
