"""Layers that ranks share, by memory that their devices show each other."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed._symmetric_memory import enable_symm_mem_for_group

from benchmarks.model.parity import Seen, run_ranks
from serve_app.wan.parallel import symmetric_memory
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import ProcessGroups, init_process_groups
from serve_app.wan.parallel.symmetric_memory import OutOfStep, SymmetricMemory
from serve_app.wan.parallel.tensor_parallel import ColumnParallel, RowParallel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

WIDTH, INSIDE = 64, 96
SHAPES = [(1, 37), (2, 1001), (1, 3), (3, 20000), (1, 37)]
"""Videos and tokens: growing, shrinking, and with a last run that is not full."""


def shared(rank: int, mesh: Mesh, port: int, sees: Seen, output: Path) -> None:
    world = meet(rank, mesh, port, sees)
    first, second = layers()
    column = SimpleNamespace(weight=part(first.weight, 0, rank), bias=part(first.bias, 0, rank))
    row = SimpleNamespace(weight=part(second.weight, 1, rank), bias=second.bias)
    layer, after = ColumnParallel(column, world.tensor.group), RowParallel(row, world.tensor.group)  # type: ignore[arg-type]
    layer, after = layer.to(world.device), after.to(world.device)
    found = []
    with torch.no_grad():
        for compiled in (False, True):
            make: Any = lambda own: after(F.gelu(layer(own), approximate="tanh"))  # noqa: E731
            make = torch.compile(make, fullgraph=True, dynamic=True) if compiled else make
            for number, hidden in enumerate(videos()):
                if number % 2 == rank:
                    torch.cuda._sleep(50_000_000)  # the other one is ahead
                tokens = F.pad(hidden, (0, 0, 0, hidden.shape[1] % 2)).chunk(2, 1)[rank]
                found.append(make(tokens.to(world.device)).cpu())
        found.append(after(layer(tokens.to(world.device), gelu=True)).cpu())
    torch.save(found, output / f"{rank}.pt")
    world.close()


def meet(rank: int, mesh: Mesh, port: int, sees: Seen, timeout_s: float = 60) -> ProcessGroups:
    device = torch.device("cuda", rank if sees == "all" else 0)
    world = init_process_groups(rank, mesh, "127.0.0.1", port, device, timeout_s=timeout_s)
    assert symmetric_memory.of(world.tensor.group.group_name) is not None
    return world


def part(whole: torch.Tensor, dim: int, rank: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(whole.detach().chunk(2, dim)[rank].contiguous(), requires_grad=False)


def layers() -> tuple[torch.nn.Linear, torch.nn.Linear]:
    torch.manual_seed(0)
    return torch.nn.Linear(WIDTH, INSIDE), torch.nn.Linear(INSIDE, WIDTH)


def videos() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(*shape, WIDTH) for shape in SHAPES]


def on_one(rank: int, mesh: Mesh, port: int) -> None:
    """Return what both ranks have of random runs and weights, again and again, each rank being late in turn."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    enable_symm_mem_for_group(dist.group.WORLD.group_name)
    peers = SymmetricMemory(dist.group.WORLD, device, timeout_s=60)
    numbers = torch.Generator(device).manual_seed(0)
    for _, run in SHAPES:
        mine = slice(rank * run, (rank + 1) * run)
        for again in range(10):
            whole = torch.randn(1, 2 * run, WIDTH, generator=numbers, device=device)
            weight = torch.randn(INSIDE, WIDTH, generator=numbers, device=device)
            if again % 2 == rank:
                torch.cuda._sleep(20_000_000)
            found, parts = torch.zeros_like(whole), whole.new_empty(2, 1, run, INSIDE)

            def use(of: int, rows: torch.Tensor, found: torch.Tensor = found, run: int = run) -> None:
                found[:, of * run : (of + 1) * run] = rows

            peers.gather(whole[:, mine], use)
            peers.share_products(whole * (rank + 1), weight, parts[0], parts[1:])
            assert torch.equal(found, whole)
            # TF32 may be on.
            torch.testing.assert_close(parts.sum(0), 3 * whole[:, mine] @ weight.t(), rtol=1e-2, atol=1e-1)
    assert peers.exchanged == 2 * (len(SHAPES) * 10 + len(symmetric_memory._TRIED_RUNS))
    os._exit(0)  # without waiting for the other one, as the end of a group would


def test_ranks_that_share_a_device_have_what_each_other_sent() -> None:
    """Order and values; what goes by NVLink is for those below."""
    run_ranks(on_one, Mesh(tensor=2))


@two_devices
@pytest.mark.parametrize("sees", ["all", "own first"])
def test_a_pair_of_layers_is_what_one_device_makes_of_it(sees: Seen, tmp_path: Path) -> None:
    run_ranks(shared, Mesh(tensor=2), sees, tmp_path, sees=sees)
    first, second = layers()
    runs = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    wanted = [*videos(), *videos(), videos()[-1]]
    with torch.no_grad():
        for hidden, *got in zip(wanted, *runs, strict=True):
            whole = torch.cat(got, dim=1)[:, : hidden.shape[1]]
            expected = second(F.gelu(first(hidden), approximate="tanh"))
            torch.testing.assert_close(whole, expected, rtol=1e-2, atol=1e-2)  # TF32 may be on


def short(rank: int, run: torch.Tensor) -> None:
    raise MemoryError


def left(rank: int, mesh: Mesh, port: int) -> None:
    world = meet(rank, mesh, port, "own first")
    peers = symmetric_memory.of(world.tensor.group.group_name)
    assert peers is not None
    fraction, held = torch.cuda.get_per_process_memory_fraction(world.device), peers.held_bytes
    for again in range(3):
        own = torch.full((1, 1000, 1000), float(rank + 10 * again), device=world.device)
        with pytest.raises(MemoryError):
            peers.gather(own, short)
        found: dict[int, torch.Tensor] = {}
        peers.gather(own, found.__setitem__)
        assert {other: run.mean().item() for other, run in found.items()} == {0: 10.0 * again, 1: 10.0 * again + 1}
        torch.cuda.synchronize()
        dist.barrier()  # no sum has told the other rank that its run was fetched
    whole = torch.cuda.get_device_properties(world.device).total_memory
    assert peers.held_bytes == 2 * own.nbytes
    less = fraction - torch.cuda.get_per_process_memory_fraction(world.device)
    assert less * whole == pytest.approx(own.nbytes * 2 - held, rel=1e-3), "the allocator is left less"
    multiply = symmetric_memory._multiply

    def broken(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        if out is parts[0]:
            raise MemoryError
        multiply(hidden, weight, out)

    parts = list(torch.empty(2, 1, 4, 8, device=world.device))
    hidden, weight = torch.ones(1, 8, 16, device=world.device), torch.ones(8, 16, device=world.device)
    with patch.object(symmetric_memory, "_multiply", broken), pytest.raises(OutOfStep, match="MemoryError"):
        peers.share_products(hidden, weight, parts[0], parts[1][None])
    world.close()


@two_devices
def test_who_is_interrupted_can_go_on_or_knows_that_it_cannot() -> None:
    run_ranks(left, Mesh(tensor=2), sees="own first")


def nothing(rank: int, run: torch.Tensor) -> None:
    pass


def alone(rank: int, mesh: Mesh, port: int) -> None:
    world = meet(rank, mesh, port, "own first")
    peers = SymmetricMemory(world.tensor.group, world.device, timeout_s=2)
    own = torch.ones(1, 10, 10, device=world.device)
    peers.gather(own, nothing)
    torch.cuda.synchronize()
    if rank == 0:
        with pytest.raises(RuntimeError):
            peers.gather(own, nothing)
            torch.cuda.synchronize()
    os._exit(0)  # the device is of no use any more


@two_devices
def test_who_waits_in_vain_fails_in_time() -> None:
    run_ranks(alone, Mesh(tensor=2), sees="own first", timeout_s=60)


def killed(rank: int, mesh: Mesh, port: int) -> None:
    world = meet(rank, mesh, port, "own first", timeout_s=600)
    peers = symmetric_memory.of(world.tensor.group.group_name)
    assert peers is not None
    own = torch.ones(1, 1000, 1000, device=world.device)
    for _ in range(100):
        peers.gather(own, nothing)
    torch.cuda.synchronize()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    peers.gather(own, nothing)
    torch.cuda.synchronize()  # its device waits for one that is gone


@two_devices
def test_devices_of_a_killed_rank_and_of_one_that_waited_for_it_serve_the_next_ones(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"\[None, -9\]"):
        run_ranks(killed, Mesh(tensor=2), sees="own first", timeout_s=30)
    run_ranks(shared, Mesh(tensor=2), "own first", tmp_path, sees="own first")
