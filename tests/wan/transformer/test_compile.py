"""Compiled blocks serve every layer, prompt, size and batch, and both experts, once they have seen sizes change."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.model.parity import relative_error, run_ranks
from serve_app.request import Params
from serve_app.wan.generate import Generator
from serve_app.wan.kernels import fused
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import init_process_groups
from serve_app.wan.sampling.sample import Sample
from serve_app.wan.sampling.sampler import advance
from serve_app.wan.sampling.warm_up import warm_up
from serve_app.wan.transformer import forward
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import Checkpoint
from tests.wan.sampling.test_sampler import BASE
from tests.wan.transformer.test_forward import modulated


@pytest.fixture(params=[False, True], ids=["plain blocks", "fused blocks"])
def compiled(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Generator]:
    """Both experts, traced and guarded as on a GPU, but run as they are."""
    torch._dynamo.reset()
    if request.param:
        monkeypatch.setattr(forward, "block_forward", forward.fused_block_forward)
        monkeypatch.setattr(fused, "_modulated", modulated)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield Generator(checkpoint, compiled=True)
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def changed(**fields: object) -> Params:
    return Params(**{**BASE.model_dump(), **fields})


def step(generator: Generator, samples: list[Sample], fuse: int = 8192) -> None:
    advance(generator.experts[samples[0].expert], samples, fuse)


def test_a_step_is_the_step_without(compiled: Generator, generator: Generator) -> None:
    ours, theirs = (one.latents(BASE) for one in (compiled, generator))
    assert relative_error(ours, theirs) <= 1e-5


def test_after_the_warm_up_nothing_is_compiled_any_more(compiled: Generator) -> None:
    counters.clear()
    for expert in compiled.experts.values():
        warm_up(expert, compiled.checkpoint, BASE, 3, 8192, torch.float32, compiled=True)
    made = graphs()
    assert 0 < made <= 4, "as many for all layers of both experts"
    requests = [
        BASE,
        changed(prompt="蓝色的星星", seed=5),
        changed(width=96, height=48),
        changed(num_frames=17),
        changed(num_frames=1, guidance_scale=1.0, guidance_scale_2=1.0),
        changed(width=128, height=80, num_frames=5),
    ]
    for params in requests:
        for batch in (1, 3):
            for fuse in (0, 8192):
                step(compiled, [compiled.start(params) for _ in range(batch)], fuse)
    sample = compiled.start(BASE)
    while not sample.finished:
        step(compiled, [sample])
    assert graphs() == made


def passes(rank: int, mesh: Mesh, port: int, checkpoint: Path, output: Path) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.compile = functools.partial(torch.compile, backend="eager")
    cpu = torch.device("cpu")
    world = init_process_groups(rank, mesh, "127.0.0.1", port, cpu, timeout_s=120)
    ours, theirs = (
        load_expert(Checkpoint(checkpoint), "transformer", world, torch.float32, cpu, compiled=compiled)
        for compiled in (True, False)
    )
    counters.clear()
    made, errors = [], []
    for seed, shape in enumerate([(1, 16, 3, 10, 6), (2, 16, 2, 6, 10), (1, 16, 1, 6, 6), (1, 16, 1, 10, 10)]):
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        latents, texts = draw(*shape), [draw(1, 512, ours.config.text_dim) for _ in range(shape[0])]
        predictions = []
        for model in (ours, theirs):
            predictions.append(model(latents, torch.full(shape[:1], 500), texts))
        errors.append(relative_error(*predictions))
        made.append(graphs())
    torch.save((made, errors), output / f"{rank}.pt")
    world.close()


@pytest.mark.parametrize("mesh", [Mesh(tensor=2), pytest.param(Mesh(sequence=2), marks=pytest.mark.slow)], ids=str)
def test_all_ranks_compile_the_same_and_the_last_size_nothing(checkpoint: Path, tmp_path: Path, mesh: Mesh) -> None:
    """Among others the ranks divide odd numbers of tokens."""
    run_ranks(passes, mesh, checkpoint, tmp_path)
    (first, errors), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert first[-1] == first[-2] > 0
    assert max(errors) <= 1e-5
