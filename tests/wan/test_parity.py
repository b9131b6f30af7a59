from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from benchmarks.parity import CASES, MESHES, bound, ours, relative_error
from serve_app.wan.mesh import Mesh

SLOW = [Mesh(sequence=4), Mesh(sequence=2, tensor=2), Mesh(guidance=2, tensor=2), Mesh(guidance=2, sequence=2)]
"""Four processes each, along axes that others have too."""


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, id=str(mesh), marks=[pytest.mark.slow] * (mesh in SLOW)) for mesh in MESHES]
)
def test_latents_equal_wan_pipeline(checkpoint: Path, reference: dict[str, torch.Tensor], mesh: Mesh) -> None:
    # Along the other axes it is three that could go wrong: the common one, 15 tokens, and no guidance.
    cases = (
        list(CASES)
        if mesh.ranks == mesh.tensor
        else ["64x64, 9 frames, 8 steps", "high, 1 frame, shift 12", "guidance off"]
    )
    ranks = ours(checkpoint, mesh, cases)
    errors = {name: relative_error(ranks[0][name], reference[name]) for name in cases}
    assert len(errors) == len(cases)
    assert max(errors.values()) <= bound(mesh), errors
    for rank in ranks[1:]:
        # Each rank steps its own copy of the latents: the smallest difference would grow from step to step.
        assert all(torch.equal(rank[name], ranks[0][name]) for name in cases)


def test_the_cases_can_tell_a_difference(reference: dict[str, torch.Tensor]) -> None:
    for one, other in itertools.combinations(reference.values(), 2):
        assert one.shape != other.shape or relative_error(one, other) > 100 * max(map(bound, MESHES))
