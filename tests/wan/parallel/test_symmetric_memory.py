"""The order in which ranks use each other's memory, in threads of one process; devices are for tests/gpu.

Streams do what they are given at once here, so that each rank goes through its calls in the order in which it makes
them. Ranks rest at random before they read and write, so that a rank that does not wait for what it needs finds
something else.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve_app.wan.parallel import symmetric_memory
from serve_app.wan.parallel.symmetric_memory import OutOfStep, SymmetricMemory

DEADLINE_S = 30
FEATURES, INSIDE = 6, 12


class Host:
    """The memory, signals and meeting points that ranks have in common."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.memory = [torch.zeros(1 << 18, dtype=torch.float64) for _ in range(ranks)]
        self.changed = threading.Condition()
        self.given: set[tuple[int, int, int]] = set()
        self.meetings: dict[int, threading.Barrier] = defaultdict(lambda: threading.Barrier(ranks))


class Handle:
    """One rank's view of it, as torch's `_SymmetricMemory`."""

    def __init__(self, host: Host, rank: int) -> None:
        self.host, self.rank, self.world_size = host, rank, host.ranks

    def get_buffer(self, rank: int, shape: Any, dtype: torch.dtype, offset: int) -> torch.Tensor:
        return self.host.memory[rank].view(dtype)[offset : offset + math.prod(shape)].view(*shape)

    def barrier(self, channel: int, timeout_ms: int) -> None:
        with self.host.changed:
            meeting = self.host.meetings[channel]
        meeting.wait(DEADLINE_S)

    def tell(self, rank: int, channel: int) -> None:
        with self.host.changed:
            signal = (self.rank, rank, channel)
            assert signal not in self.host.given, "nobody has waited for the last one, so one of them is lost"
            self.host.given.add(signal)
            self.host.changed.notify_all()

    def put_signal(self, rank: int, channel: int, timeout_ms: int) -> None:
        self._turn((self.rank, rank, channel), given=False)

    def wait_signal(self, rank: int, channel: int, timeout_ms: int) -> None:
        self._turn((rank, self.rank, channel), given=True)

    def _turn(self, signal: tuple[int, int, int], given: bool) -> None:
        with self.host.changed:
            assert self.host.changed.wait_for(lambda: (signal in self.host.given) == given, DEADLINE_S)
            (self.host.given.remove if given else self.host.given.add)(signal)
            self.host.changed.notify_all()


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: None) -> None:
        pass


class Peers(SymmetricMemory):
    def __init__(self, host: Host, rank: int) -> None:
        self._memory: Any = Handle(host, rank)
        self._me, self._size, self._timeout_ms = rank, host.ranks, 0
        self._device = torch.device("cpu")
        self._copies, self._beside = Stream(), Stream()  # type: ignore[assignment]
        self._shape, self._gathers = (), 0
        self.held_bytes, self.exchanged = host.memory[rank].nbytes, 0

    @property
    def _main(self) -> Any:
        return Stream()

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        rest()
        for row, other in zip(to.flatten(0, -2), source.flatten(0, -2), strict=True):
            row.copy_(other)
            rest()

    def _tell(self, rank: int, channel: int) -> None:
        self._memory.tell(rank, channel)

    def _told(self, rank: int, channel: int) -> None:
        self._memory.wait_signal(rank, channel, 0)


def rest() -> None:
    if random.random() < 0.2:
        time.sleep(random.random() / 1e3)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = symmetric_memory._multiply

    def slowly(*given: torch.Tensor) -> None:
        rest()
        multiply(*given)
        rest()

    monkeypatch.setattr(symmetric_memory, "_multiply", slowly)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_runs_and_sums_are_those_of_one_device(ranks: int) -> None:
    def short(rank: int, run: torch.Tensor) -> None:
        raise MemoryError

    torch.manual_seed(0)
    host = Host(ranks)
    shapes = [(1, 21), (1, 21), (2, 9), (2, 9), (2, 9), (1, 2), (1, 2)] * 3  # ranks meet where they change
    videos = [torch.randn(*shape, FEATURES).double() for shape in shapes]
    weight = torch.randn(FEATURES, INSIDE).double()
    inside = [torch.randn(*video.shape[:2], INSIDE).double() for video in videos]

    def rank_does(rank: int) -> None:
        peers = Peers(host, rank)
        for video, hidden in zip(videos, inside, strict=True):
            run = -(-video.shape[1] // ranks)
            padded = torch.cat([video, video.new_zeros(len(video), ranks * run - video.shape[1], FEATURES)], dim=1)
            own = padded[:, rank * run : (rank + 1) * run]
            found: dict[int, torch.Tensor] = {}
            with pytest.raises(MemoryError):
                peers.gather(own, short)  # and again
            peers.gather(own, found.__setitem__)
            whole = torch.cat([found[other] for other in range(ranks)], dim=1)
            assert torch.equal(whole, padded)
            parts = torch.full((ranks, len(video), run, FEATURES), math.nan).double()
            peers.share_products(hidden.chunk(ranks, 2)[rank], weight.chunk(ranks, 1)[rank], parts[0], parts[1:])
            expected = torch.zeros_like(padded)
            expected[:, : video.shape[1]] = hidden @ weight.t()
            torch.testing.assert_close(parts.sum(0), expected[:, rank * run : (rank + 1) * run])

    with ThreadPoolExecutor(ranks) as threads:
        list(threads.map(rank_does, range(ranks)))
    assert not host.given, "every signal was waited for"


@pytest.mark.parametrize("ranks", [2, 3])
def test_copies_that_are_tried_are_right_or_said_to_be_wrong(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric_memory, "_TRIED_RUNS", (6, 9, 9))
    monkeypatch.setattr(symmetric_memory, "_TRIED_WIDTH", 8)
    host = Host(ranks)
    with ThreadPoolExecutor(ranks) as threads:
        list(threads.map(lambda rank: Peers(host, rank)._try_copies(), range(ranks)))

    class Wrong(Peers):
        def _copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
            super()._copy(to, source)
            if self._me == 1:
                to[0, -1, 0] += 1

    host = Host(ranks)
    with ThreadPoolExecutor(ranks) as threads:
        tried = [threads.submit(Wrong(host, rank)._try_copies) for rank in range(ranks)]
    failed = [one.exception() for one in tried]
    assert any(failed) and all(error is None or "is not what it was" in str(error) for error in failed)


def test_a_sum_that_is_broken_off_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(symmetric_memory, "_multiply", short)
    peers = Peers(Host(1), 0)
    with pytest.raises(OutOfStep, match="OutOfMemoryError: CUDA out of memory"):
        peers.share_products(torch.ones(1, 4, 2), torch.ones(3, 2), torch.ones(1, 4, 3), torch.ones(0, 1, 4, 3))


def test_it_can_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    group = SimpleNamespace(group_name="of ranks that nobody asks")
    with caplog.at_level("INFO"):
        symmetric_memory.connect(group, torch.device("cuda", 0), timeout_s=1, wanted=False)
    assert symmetric_memory.of(group.group_name) is None
    (line,) = caplog.records
    assert (line.message, line.used, line.reason) == ("exchange", "NCCL", "asked for")  # type: ignore[attr-defined]


def test_a_trial_that_costs_the_device_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(symmetric_memory, "_missing", lambda *_: None)
    monkeypatch.setattr(symmetric_memory, "_all", lambda said, *_: said)
    monkeypatch.setattr(symmetric_memory, "SymmetricMemory", broken)
    monkeypatch.setattr("torch.distributed._symmetric_memory.enable_symm_mem_for_group", lambda name: None)
    with pytest.raises(RuntimeError, match=r"unspecified launch failure.*denoiser\.symmetric_memory: false"):
        symmetric_memory.connect(SimpleNamespace(group_name="x"), torch.device("cuda", 0), timeout_s=1)
    assert symmetric_memory.of("x") is None
