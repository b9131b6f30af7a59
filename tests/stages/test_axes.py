"""A group that shares a step along other axes than the weights', driven by the engine."""

from __future__ import annotations

import pytest
import torch

from benchmarks.model.parity import relative_error
from serve_app.launch.fleet import replicas
from serve_app.planning.model_shape import ModelShape
from serve_app.wan.generate import Generator
from serve_app.wan.weights.checkpoint import Checkpoint
from tests.stages.conftest import Wan, until
from tests.stages.test_engine import deploy_two
from tests.stages.test_pipeline import denoise


def check(app: Wan, mesh: str) -> None:
    """Check the mesh, and that samples are those of one rank."""
    assert app.handle("Denoiser").describe.remote().result()["mesh"] == mesh
    generator = Generator(app.config.model.folder)
    # One frame of 80 x 48 is 15 tokens, which two ranks cannot share evenly.
    for fields in ({"seed": 1}, {"seed": 2, "width": 80, "num_frames": 1}, {"seed": 3, "guidance_scale": 1.0}):
        params = app.params(**fields)
        ours = denoise(app, f"{mesh} {fields['seed']}", params)
        theirs = generator.latents(params)
        assert relative_error(torch.tensor(ours), theirs) <= 1e-4


@pytest.mark.slow
def test_passes_are_shared_where_nothing_is_said(deploy):
    check(deploy_two(deploy), "guidance 2 x sequence 1 x tensor 1")


@pytest.mark.slow
def test_tokens_and_weights_are_shared(deploy):
    app = deploy(denoiser={"parallel": {"sequence": 2, "tensor": 2}})
    check(app, "guidance 1 x sequence 2 x tensor 2")


@pytest.mark.slow
def test_what_replicas_say_of_themselves(deploy):
    """Every stage is on the board, with its mesh and the memory of each rank against the plan."""
    app = deploy_two(deploy)
    denoise(app, "board", app.params(seed=1))
    until(lambda: sum(bool(one.note.get("memory")) for one in replicas()) == 3)
    # The sample may still be inside in the note of a moment ago.
    until(lambda: not any(one.note.get("samples") for one in replicas()))
    found = {one.deployment: one for one in replicas()}
    assert set(found) == {"Encoder", "Denoiser", "Decoder"} and all(one.state == "running" for one in found.values())
    group = found["Denoiser"].note
    assert group["mesh"] == "guidance 2 x sequence 1 x tensor 1" and not group["tight"]
    assert len(group["memory"]) == 2
    model = ModelShape.of(Checkpoint(app.config.model.folder))
    for memory in group["memory"]:
        weights = sum(model.expert_bytes(index, 4, 1).total for index in range(2))
        assert memory["parts"]["weights"] == weights < memory["planned"]
        assert 0 < memory["allocated"] < memory["limit"] and memory["free"] > 0
    for stage in ("Encoder", "Decoder"):
        (memory,) = found[stage].note["memory"]
        assert 0 < memory["parts"]["weights"] < memory["planned"]
