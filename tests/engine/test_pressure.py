"""A group whose memory runs short takes no batch mates, parks samples on the host, and says which component it is."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from serve_app.config import Config
from serve_app.device_memory import DeviceMemory, measure
from serve_app.engine.engine import Engine
from serve_app.engine.messages import Admitted, RankStatus, StepRequest, StepResult
from serve_app.engine.pressure import TENTH, Pressure
from serve_app.engine.rank import Rank
from serve_app.engine.sample_request import EncodedRequest, SampleRequest
from serve_app.engine.scheduler import Entry, Scheduler
from serve_app.request import Params
from serve_app.wan.parallel.mesh import Mesh

MB = 1 << 20


def test_below_a_tenth_it_is_tight_until_there_is_enough_again() -> None:
    pressure = Pressure()
    for headroom, tight in ((0.5, False), (0.11, False), (0.09, True), (0.5, True)):
        pressure.note(headroom, "")
        assert pressure.tight == tight
    for _ in range(20):
        pressure.note(0.12, "")  # more than the tenth, and not enough to go back
    assert pressure.tight
    pressure.note(0.2, "")
    assert not pressure.tight


def test_below_half_of_it_one_line_names_the_component(caplog: pytest.LogCaptureFixture) -> None:
    pressure = Pressure()
    with caplog.at_level(logging.INFO, "serve_app"):
        for headroom in (0.09, 0.04, 0.03, 0.04):
            pressure.note(headroom, "the step (700 MiB)")
    (line,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert line.message == "memory is nearly full" and line.most == "the step (700 MiB)" and line.left == "4.0 %"  # type: ignore[attr-defined]


def entry(name: str, state_mib: float = 10) -> Entry:
    return Entry(name, (1, 2, 2), True, 10, 8, 4, state_mib=state_mib)


def test_a_tight_scheduler_takes_one_and_parks_the_others() -> None:
    scheduler = Scheduler(samples_per_step=4, tokens_per_step=1000, parked_memory_mib=4096)
    for name in "abc":
        scheduler.add(entry(name))
    assert len(scheduler.pick(0)) == 3
    scheduler.tight = True
    chosen = scheduler.pick(0)
    assert [one.id for one in chosen] == ["a"] and scheduler.parked_off_device(chosen, 0) == ["b", "c"]
    scheduler.tight = False
    assert len(scheduler.pick(0)) == 3 and scheduler.parked_off_device(scheduler.pick(0)[:1], 0) == []


def test_headroom_counts_what_others_took() -> None:
    mine = DeviceMemory(allocated=40, reserved=60, peak=50, free=1000, limit=100)
    assert mine.headroom == pytest.approx(0.5)
    crowded = DeviceMemory(allocated=40, reserved=52, peak=50, free=0, limit=100)
    assert crowded.headroom == pytest.approx(1 - 50 / 52)
    assert DeviceMemory(peak=50, limit=math.inf, free=math.inf).headroom == 1.0
    parts = {"weights": 30.0 * MB, "texts": 2.0 * MB, "other": 5.0 * MB}
    assert DeviceMemory(allocated=40 * MB, peak=70 * MB, parts=parts).largest == "the step (30 MiB)"
    assert DeviceMemory(allocated=40 * MB, peak=41 * MB, parts=parts).largest == "other (5 MiB)"


def test_a_process_on_cpus_is_measured_whole() -> None:
    found = measure(torch.device("cpu"), 1e12, {"weights": 1e6})
    assert found.allocated == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert found.parts["other"] == found.allocated - 1e6 and 0 < found.free <= psutil.virtual_memory().total


class OneRank:
    """A group of one rank of the tiny model in this process."""

    def __init__(self, config: Config) -> None:
        self.rank = Rank(config, 0)
        self.rank.load("127.0.0.1", 0, Mesh())
        self.requests: list[StepRequest] = []
        self.stepped = asyncio.Event()

    async def admit(self, name: str, params: Params, positive: Any, negative: Any, state: Any) -> Admitted:
        return self.rank.admit(name, params, positive, negative, state)

    async def step(self, request: StepRequest) -> StepResult:
        await asyncio.sleep(0)
        self.requests.append(request)
        result = StepResult.from_wire(self.rank.step(request.to_wire()))
        self.stepped.set()
        return result

    async def latents(self, name: str) -> np.ndarray:
        return self.rank.latents(name)

    async def drop(self, names: list[str]) -> None:
        self.rank.drop(names)

    async def steps(self, done: Any) -> None:
        """Wait for a step after which `done` holds."""
        while not self.requests or not done():
            self.stepped.clear()
            await self.stepped.wait()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneRank]:
    """A rank that may take 400 MB more than this process has now."""
    from serve_app.wan.parallel.process_groups import ProcessGroups

    monkeypatch.setattr(
        "serve_app.wan.parallel.process_groups.init_process_groups", lambda *args: ProcessGroups.alone(args[4])
    )
    # What the first step loads comes before the limit is set.
    made = OneRank(config())
    text = np.ones((4, 128), dtype=np.float32)
    made.rank.admit("first", request("first").params, text, text)
    made.rank.step(StepRequest(["first"]).to_wire())
    made.rank.drop(["first"])
    object.__setattr__(made.rank.model, "limit", psutil.Process().memory_info().rss + 400.0 * MB)
    yield made


def config() -> Config:
    return Config.model_validate(
        {
            "denoiser": {"samples_per_step": 4, "device": "cpu", "threads": 1, "checkpoint_s": 0, "warmup": False},
            "defaults": {
                "width": 64,
                "height": 64,
                "num_frames": 5,
                "num_inference_steps": 400,
                "boundary_ratio": 0.875,
            },
            "limits": {"num_inference_steps": 400},
        }
    )


def request(name: str) -> SampleRequest:
    params = Params(**config().defaults.model_dump(), prompt="a cat", seed=1)
    return SampleRequest(name, params, "standard", 0.0, None, False)


async def test_a_rank_whose_memory_is_filled(group: OneRank, caplog: pytest.LogCaptureFixture) -> None:
    """The process is filled up to its limit while two samples share passes. They part, and join once it is free."""
    engine = Engine(group, config())  # type: ignore[arg-type]
    text = np.ones((4, 128), dtype=np.float32)
    async with engine.place(request("a")), engine.place(request("b")):
        for name in "ab":
            await engine.admit(EncodedRequest(request(name), text, text, None))
        await group.steps(lambda: len(group.requests[-1].advance) == 2)
        status: RankStatus = _status(group.rank)
        before = status.memory
        assert before.parts["weights"] == group.rank.model.experts.device_bytes and before.headroom > TENTH
        ballast = bytearray(b"x" * (385 * MB))
        with caplog.at_level(logging.INFO, "serve_app"):
            await group.steps(lambda: len(group.requests[-1].advance) == 1)
            filled = _status(group.rank).memory
            assert filled.headroom < TENTH and filled.parts["other"] > before.parts["other"] + 300 * MB
            await group.steps(lambda: group.requests[-1].park != [])
            assert set(group.requests[-1].advance + group.requests[-1].park) == {"a", "b"}
        warned = [record for record in caplog.records if record.message == "memory is nearly full"]
        assert len(warned) == 1 and warned[0].most.startswith("other (")  # type: ignore[attr-defined]
        del ballast
        await group.steps(lambda: len(group.requests[-1].advance) == 2)
    engine._task.cancel()


def _status(rank: Rank) -> RankStatus:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.get_runtime_context", lambda: type("Context", (), {"get_node_id": lambda self: "here"})())
        return rank.status()
