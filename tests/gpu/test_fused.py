"""Kernels of our own against the formulas that they stand for, and products added up beside each other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.model.parity import run_ranks
from serve_app.wan.kernels.fused import LinearGelu, norm_rotate, square_sums
from serve_app.wan.parallel import symmetric_memory
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import init_process_groups
from serve_app.wan.parallel.tensor_parallel import ROWS, RowParallel
from serve_app.wan.transformer.attention import ShardedNorm, _rotate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def on_the_device() -> object:
    torch.manual_seed(0)
    with torch.no_grad(), torch.device("cuda", 0):
        yield


@pytest.mark.parametrize("heads, head", [(40, 128), (3, 24), (1, 128)])
@pytest.mark.parametrize("given", [False, True], ids=["alone", "with other ranks"])
def test_norm_and_rotation_in_one_kernel(heads: int, head: int, given: bool) -> None:
    batch, tokens, features = 2, 70, heads * head * (2 if given else 1)
    hidden = torch.randn(batch, tokens, heads * head, dtype=torch.bfloat16)
    norm = ShardedNorm(features, 2 if given else 1, 1e-6, torch.bfloat16).cuda()
    norm.weight.uniform_(0.5, 1.5)
    angle = torch.rand(1, tokens, 1, head // 2).repeat_interleave(2, -1)
    squares = norm.squares(hidden) * (1.7 if given else 1)
    expected = _rotate(norm(hidden, squares).unflatten(2, (heads, head)), angle.cos(), angle.sin())
    got = norm_rotate(hidden, norm, squares if given else None, angle.cos(), angle.sin())
    assert got.shape == expected.shape and got.dtype == torch.bfloat16
    # The order of a sum may move a value to the neighbouring one.
    assert (got - expected).float().norm() <= 1e-3 * expected.float().norm()


@pytest.mark.parametrize("width", [2560, 72])
def test_sums_of_squares_of_several(width: int) -> None:
    norm = ShardedNorm(2 * width, 2, 1e-6, torch.bfloat16)
    parts = [torch.randn(2, tokens, width, dtype=torch.bfloat16) for tokens in (70, 1, 4)]
    expected = torch.cat([norm.squares(part) for part in parts], dim=1)
    got = square_sums(parts)
    assert got.shape == (2, 75, 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", [5120, 72])
@pytest.mark.parametrize("tokens", [70, 1])
def test_norm_and_modulation_in_one_kernel(width: int, tokens: int) -> None:
    hidden, added = torch.randn(2, 2, tokens, width, dtype=torch.bfloat16) * 3 + 1
    modulation = torch.randn(2, 6, width)
    modulation[0] *= 2

    def expected(hidden: torch.Tensor, first: int) -> torch.Tensor:
        normed = F.layer_norm(hidden.float(), (width,), eps=1e-6)
        return (normed * (1 + modulation[:, [first + 1]]) + modulation[:, [first]]).bfloat16()

    got = torch.ops.wan_serve.norm_modulate(hidden, modulation, 0, 1e-6)
    torch.testing.assert_close(got, expected(hidden, 0), rtol=1e-2, atol=1e-3)
    total, got = torch.ops.wan_serve.add_norm_modulate(hidden, added, modulation, 3, 1e-6)
    assert torch.equal(total, hidden + added)
    torch.testing.assert_close(got, expected(hidden + added, 3), rtol=1e-2, atol=1e-3)


def test_a_product_that_writes_its_gelu() -> None:
    hidden = torch.randn(2, 300, 256, dtype=torch.bfloat16)
    proj = torch.nn.Linear(256, 512, dtype=torch.bfloat16)
    exact = F.gelu(F.linear(hidden.double(), proj.weight.double(), proj.bias.double()), approximate="tanh")
    apart = F.gelu(proj(hidden), approximate="tanh")
    got = LinearGelu(proj)(hidden)
    assert got.shape == apart.shape and got.dtype == torch.bfloat16
    assert (got - exact).norm() <= (apart - exact).norm(), "rounded once, not twice"


def added_up(rank: int, mesh: Mesh, port: int, output: Path) -> None:
    device = torch.device("cuda", 0)
    world = init_process_groups(rank, mesh, "127.0.0.1", port, device, timeout_s=60)
    assert symmetric_memory.of(world.tensor.group.group_name) is None  # type: ignore[union-attr]
    hidden, linear = layer()
    part = SimpleNamespace(weight=torch.nn.Parameter(linear.weight.chunk(2, 1)[rank].contiguous()), bias=linear.bias)
    ours = RowParallel(part, world.tensor.group).to(device)  # type: ignore[arg-type]
    with torch.no_grad():
        got = ours(hidden.chunk(2, 2)[rank].to(device))
        compiled = torch.compile(ours, fullgraph=True)(hidden.chunk(2, 2)[rank].to(device))
    torch.save((got.cpu(), compiled.cpu()), output / f"{rank}.pt")
    world.close()


def layer() -> tuple[torch.Tensor, torch.nn.Linear]:
    torch.manual_seed(0)
    with torch.device("cpu"):
        return torch.randn(1, 3 * ROWS + 5, 64), torch.nn.Linear(64, 48)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_parts_of_a_product_are_added_up_while_others_are_made(tmp_path: Path) -> None:
    run_ranks(added_up, Mesh(tensor=2), tmp_path, sees="own")
    hidden, linear = layer()
    runs, compiled = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    whole = torch.cat(runs, dim=1)
    assert whole.shape[1] == hidden.shape[1] + 1, "the last run ends in a row for no token"
    with torch.device("cpu"):
        torch.testing.assert_close(whole[:, :-1], linear(hidden), rtol=1e-2, atol=1e-2)  # TF32 may be on
    torch.testing.assert_close(torch.cat(compiled, dim=1), whole)
