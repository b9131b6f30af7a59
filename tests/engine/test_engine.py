"""The engine beside a group that misbehaves: who hears what, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from serve_app.config import Config, DenoiserConfig
from serve_app.engine.engine import Engine
from serve_app.engine.errors import GroupLost, OutOfMemory
from serve_app.engine.messages import Admitted, StepRequest, StepResult
from serve_app.engine.sample_request import Denoised, EncodedRequest, SampleRequest
from serve_app.errors import JobFailed
from serve_app.metrics import catalog as metrics
from serve_app.request import Params

STEPS = 4


class FakeGroup:
    """Counts the steps of each sample, and raises what it is told to."""

    def __init__(self) -> None:
        self.stepped: dict[str, int] = {}
        self.passes: list[list[str]] = []
        self.most = 99
        self.guilty = ""
        self.no_latents: Exception | None = None

    async def admit(self, sample_id: str, *_: Any) -> Admitted:
        self.stepped[sample_id] = 0
        return Admitted(10, 0, STEPS, 2, 1.0, 1.0, 1.0, None)

    async def step(self, request: StepRequest) -> StepResult:
        await asyncio.sleep(0)
        if len(request.advance) > self.most:
            raise OutOfMemory("too many")
        if self.guilty in request.advance:
            raise ValueError("guilty")
        self.passes.append(request.advance)
        for name in request.advance:
            self.stepped[name] += 1
        return StepResult(0.0, {})

    async def latents(self, sample_id: str) -> np.ndarray:
        if self.no_latents is not None:
            raise self.no_latents
        return np.zeros(1)

    async def drop(self, sample_ids: list[str]) -> None:
        pass


class BusyGroup(FakeGroup):
    """Does one call after the other, as ranks do; each answer takes a while to arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.one_at_a_time = asyncio.Lock()
        self.in_step = asyncio.Event()

    async def admit(self, sample_id: str, *_: Any) -> Admitted:
        async with self.one_at_a_time:
            admitted = await super().admit(sample_id)
        await asyncio.sleep(0.01)
        return admitted

    async def step(self, request: StepRequest) -> StepResult:
        async with self.one_at_a_time:
            result = await super().step(request)
            self.in_step.set()
            await asyncio.sleep(0.02)
        return result


def engine_of(group: FakeGroup) -> Engine:
    return Engine(group, Config(denoiser=DenoiserConfig(samples_per_step=4)))  # type: ignore[arg-type]


async def one(engine: Engine, name: str, **fields: Any) -> Denoised | Exception:
    """Put a sample through the engine, and return its last event."""
    settings = {"negative_prompt": "", "fps": 16, "seed": 0, "guidance_scale": 4, "guidance_scale_2": 3}
    sizes = {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": STEPS}
    params = Params(prompt="x", flow_shift=5, boundary_ratio=0.5, **settings, **sizes)
    request = SampleRequest(name, params, **fields)
    try:
        async with engine.place(request):
            await engine.admit(EncodedRequest(request, np.zeros((1, 1)), np.zeros((1, 1))))
            return [event async for event in engine.events(name)][-1]  # type: ignore[return-value]
    except JobFailed as error:
        return error


async def run(group: FakeGroup, names: str) -> dict[str, Denoised | Exception]:
    """Put every sample through one engine, all admitted before the first step."""
    engine = engine_of(group)
    async with asyncio.timeout(60):
        ends = await asyncio.gather(*(one(engine, name) for name in names))
        return dict(zip(names, ends, strict=True))


async def test_a_batch_that_does_not_fit_is_done_one_by_one_and_not_tried_as_large_again() -> None:
    group = FakeGroup()
    group.most = 2
    ends = await run(group, "abcd")
    assert all(isinstance(end, Denoised) for end in ends.values())
    assert group.stepped == dict.fromkeys("abcd", STEPS), "each step once, whatever was tried"


async def test_steps_are_measured() -> None:
    def seen() -> list[float]:
        kinds = [metrics.step_seconds.count(size="240p", expert=expert) for expert in ("high_noise", "low_noise")]
        return [*kinds, metrics.stepped_samples.value() or 0, 1e12 * (metrics.work_tflop.value() or 0)]

    group, before = FakeGroup(), seen()
    group.most = 2
    short = metrics.steps_out_of_memory.value() or 0
    await run(group, "abcd")
    high, low, samples, work = (now - then for now, then in zip(seen(), before, strict=True))
    assert high > 0 < low and high + low == len(group.passes) and samples == 4 * STEPS
    assert work == pytest.approx(4 * STEPS, abs=0.5)  # one unit each, beside what other tests have counted
    assert (metrics.steps_out_of_memory.value() or 0) > short
    assert (metrics.resident_samples.value(), metrics.waiting_samples.value()) == (0, 0)


async def test_what_does_not_fit_alone_fails() -> None:
    group = FakeGroup()
    group.most = 0
    (end,) = (await run(group, "a")).values()
    assert isinstance(end, JobFailed) and end.code == "out_of_memory" and not end.retryable


async def test_only_who_is_at_fault_fails() -> None:
    group = FakeGroup()
    group.guilty = "b"
    ends = await run(group, "abc")
    assert isinstance(ends["b"], JobFailed) and ends["b"].code == "step_failed" and "guilty" in ends["b"].message
    assert isinstance(ends["a"], Denoised) and isinstance(ends["c"], Denoised)
    assert group.stepped == {"a": STEPS, "b": 0, "c": STEPS}


@pytest.mark.parametrize("error", [KeyError("gone"), MemoryError()])
async def test_a_failure_after_the_step_repeats_no_step_and_is_heard(error: Exception) -> None:
    group = FakeGroup()
    group.no_latents = error
    ends = await run(group, "ab")
    for end in ends.values():
        assert isinstance(end, JobFailed) and end.code == "group_lost" and end.retryable and end.step is None
    assert group.stepped == {"a": STEPS, "b": STEPS}


async def test_who_comes_during_a_step_is_in_the_next_one() -> None:
    group = BusyGroup()
    engine = engine_of(group)
    async with asyncio.timeout(60):
        first = asyncio.create_task(one(engine, "a"))
        await group.in_step.wait()
        begun = len(group.passes)
        second = await one(engine, "b", priority="interactive")
        assert isinstance(second, Denoised) and isinstance(await first, Denoised)
    assert all("b" in names for names in group.passes[begun : begun + STEPS]), group.passes


async def test_a_group_lost_while_a_sample_comes_is_heard() -> None:
    class Gone(BusyGroup):
        async def admit(self, sample_id: str, *_: Any) -> Admitted:
            if sample_id == "b":
                raise GroupLost("gone")
            return await super().admit(sample_id)

    engine = engine_of(Gone())
    async with asyncio.timeout(60):
        ends = await asyncio.gather(one(engine, "a"), one(engine, "b"))
    assert [end.code for end in ends if isinstance(end, JobFailed)] == ["group_lost"] * 2
