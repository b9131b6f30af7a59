"""Sums and parts between ranks, each a process of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks.model.parity import run_ranks
from serve_app.wan.parallel.collectives import _MOST_BYTES, add_up, gather, stack, sum_up
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import init_process_groups

CPU = torch.device("cpu")
SIZES = (1, 1000, _MOST_BYTES // 4, _MOST_BYTES // 4 + 1)


def part(rank: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank))


def exchanged(rank: int, mesh: Mesh, port: int, output: Path) -> None:
    world = init_process_groups(rank, mesh, "127.0.0.1", port, CPU, timeout_s=120)
    group, sums = world.tensor.group, []
    for size in SIZES:
        mine = part(rank, size)
        assert all(torch.equal(one, part(index, size)) for index, one in enumerate(gather(mine, group))), (
            "parts in the order of ranks"
        )
        stacked, coming = stack(mine, group)
        assert coming is None and torch.equal(stacked, torch.stack(gather(mine, group)))
        for_each = torch.stack([(other + 1) * mine for other in range(mesh.ranks)])
        own = torch.empty_like(mine)
        assert sum_up(for_each, own, group) is None
        torch.testing.assert_close(own, (rank + 1) * sum(stacked))
        add_up(mine, group)
        sums.append(mine)
    column = part(rank, 600).view(20, 30).t()  # not contiguous
    add_up(column, group)
    torch.save([*sums, column], output / f"{rank}.pt")
    world.close()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_get_the_sum_the_same_to_the_bit(ranks: int, tmp_path: Path) -> None:
    run_ranks(exchanged, Mesh(tensor=ranks), tmp_path)
    first, *others = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for other in others:
        assert all(map(torch.equal, first, other))
    for size, got in zip(SIZES, first, strict=False):
        torch.testing.assert_close(got, sum(part(rank, size) for rank in range(ranks)))
    torch.testing.assert_close(first[-1], sum(part(rank, 600).view(20, 30).t() for rank in range(ranks)))


def left_alone(rank: int, mesh: Mesh, port: int, output: Path) -> None:
    world = init_process_groups(rank, mesh, "127.0.0.1", port, CPU, timeout_s=3)
    add_up(part(rank, 10), world.tensor.group)
    other = output.with_suffix(".pid")
    if rank == 1:
        other.write_text(str(os.getpid()))
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGSTOP if output.name == "hung" else signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError):
        add_up(part(rank, 10), world.tensor.group)
    output.write_text(str(time.monotonic() - started))
    if output.name == "hung":
        os.kill(int(other.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("how", ["dead", "hung"])
def test_a_rank_that_is_gone_is_not_waited_for_for_ever(how: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank"):  # the other one's end
        run_ranks(left_alone, Mesh(tensor=2), tmp_path / how, timeout_s=120)
    assert float((tmp_path / how).read_text()) < 60
