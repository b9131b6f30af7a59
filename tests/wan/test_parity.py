from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from benchmarks.model.parity import CASES, MESHES, arguments, bound, ours, relative_error
from serve_app.wan.generate import Generator
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.weights.checkpoint import Checkpoint

SLOW = [mesh for mesh in MESHES if mesh.ranks == 4]
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


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"boundary_ratio": 0.5}),
        ("model_index.json", {"boundary_ratio": 1}),
        ("model_index.json", {"boundary_ratio": None}),
        ("scheduler/scheduler_config.json", {"solver_order": 3}),
        ("scheduler/scheduler_config.json", {"solver_order": 1}),
        ("scheduler/scheduler_config.json", {"final_sigmas_type": "sigma_min"}),
        ("scheduler/scheduler_config.json", {"disable_corrector": [0, 1]}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "leading", "steps_offset": 3, "beta_end": 0.5}),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_what_the_folder_says_of_sampling(
    generator: Generator, checkpoint: Path, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    """A request without a boundary, on an edited folder, against WanPipeline on that folder as it loads it."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "edited"))
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    shift = pipeline.scheduler.config.flow_shift
    params = CASES["64x64, 9 frames, 8 steps"].model_copy(update={"boundary_ratio": None, "flow_shift": shift})
    said = arguments(params)
    if pipeline.config.boundary_ratio is None:
        said["guidance_scale_2"] = None  # which it takes for a mistake then
    expected = pipeline(**said, output_type="latent").frames
    try:
        generator.checkpoint = Checkpoint(folder)
        found = generator.latents(params)
    finally:
        generator.checkpoint = Checkpoint(checkpoint)
    assert relative_error(found, expected) <= bound(Mesh())
    assert relative_error(generator.latents(params), expected) > 100 * bound(Mesh()) or "timestep_spacing" in changes
