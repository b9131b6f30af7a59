"""Promises of the step engine: samples overtake, leave, move, are saved and resumed, and no pixel changes."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from typing import Any

import numpy as np
import psutil
import pytest

from serve_app.dispatch.deployment import translate
from serve_app.engine.sample_request import Denoised, Moved, SampleRequest
from serve_app.errors import JobFailed
from serve_app.events import Progress
from serve_app.request import Params
from serve_app.stages.denoiser import Started
from tests.stages.conftest import Wan, processes, until

LONG: dict[str, Any] = {"num_inference_steps": 40}


class Run:
    """A sample on its way through encoder and denoiser, followed by a thread.

    Attributes:
        latents: at the end; None before, and if it failed.
        moved: where it was sent away, the event.
        times: when each of its steps was heard of.
    """

    def __init__(self, app: Wan, params: Params, name: str, deployment: str = "Denoiser", **options: Any) -> None:
        self.started: Started | None = None
        self.step = 0
        self.times: list[float] = []
        self.latents: np.ndarray | None = None
        self.moved: Moved | None = None
        self.error: Exception | None = None
        request = {key: options.pop(key) for key in ("priority", "created_at", "state_prefix") if key in options}
        encoder, denoiser = app.handle("Encoder"), app.handle(deployment).options(stream=True)
        encoded = encoder.encode.remote(params.prompt, params.negative_prompt if params.guided else None)
        self._ask = lambda: denoiser.denoise.remote(SampleRequest(name, params, **request), encoded, **options)
        self._again = options.get("resume", False)
        self.response = self._ask()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            for event in self.response:
                if isinstance(event, Started):
                    self.started, self.step = event, event.step
                elif isinstance(event, Progress):
                    self.step = event.step
                    self.times.append(time.monotonic())
                elif isinstance(event, Denoised):
                    self.latents = np.array(event.latents)
                else:
                    self.moved = event
            if self._again and self.latents is None:  # turned away by a replica that is about to go
                time.sleep(0.1)
                self.response = self._ask()
                self._follow()
        except Exception as error:
            self.error = translate(error)

    def at(self, step: int) -> Run:
        """Wait until so many steps are done."""
        until(lambda: self.step >= step or not self._thread.is_alive())
        assert self.step >= step, self.error
        return self

    def wait(self) -> None:
        self._thread.join(120)

    def result(self) -> np.ndarray:
        self.wait()
        if self.error is not None:
            raise self.error
        assert self.latents is not None, self.moved
        return self.latents

    def failure(self) -> JobFailed:
        self.wait()
        assert isinstance(self.error, JobFailed), self.error
        return self.error


@pytest.fixture(scope="module")
def app(deploy: Any) -> Wan:
    return deploy_two(deploy)


def deploy_two(deploy: Any) -> Wan:
    """Deploy two ranks and say no axis, so that each makes one of the two passes of a step."""
    app: Wan = deploy(
        denoiser={
            "parallel": {"ranks": 2},
            "samples_per_step": 1,
            "resident_samples": 3,
            "checkpoint_s": 0.1,
            "batch": {"size": 4, "wait_s": 0.01},
        },
        limits={"num_inference_steps": 2000},
    )
    return app


@pytest.fixture(scope="module")
def alone(app: Wan) -> np.ndarray:
    """Latents of `long` when it runs alone."""
    return Run(app, app.params(seed=1, **LONG), "alone").result()


def long(app: Wan, name: str, **options: Any) -> Run:
    return Run(app, app.params(seed=1, **LONG), name, **options)


def test_a_preview_overtakes_a_long_sample_and_neither_changes(app, alone):
    preview = app.params(seed=2, width=32, height=32, num_frames=5, num_inference_steps=3)
    by_itself = Run(app, preview, "by-itself").result()
    clip = long(app, "clip").at(2)
    overtaking = Run(app, preview, "preview")
    assert np.array_equal(overtaking.result(), by_itself)
    assert clip.step < 40, "it did not overtake"
    assert np.array_equal(clip.result(), alone)


def test_a_class_goes_before_less_work_and_who_waited_long_goes_first(app):
    batch = Run(app, app.params(seed=3, **LONG), "batch", priority="batch").at(1)
    standard = Run(app, app.params(seed=4, width=32, num_inference_steps=80), "standard")
    standard.result()
    assert batch.step < 40, "more work, but a class above"
    overdue = Run(app, app.params(seed=5, width=32, num_inference_steps=80), "overdue", created_at=time.time() - 1e6)
    overdue.at(1)
    quick = Run(app, app.params(seed=6, num_inference_steps=5), "quick", priority="interactive")
    for run in (overdue, quick, batch):
        run.result()
    # Two steps of margin: the three are heard of over streams of their own.
    assert overdue.times[-2] < quick.times[2] < quick.times[-2] < batch.times[-1], "its turn had come long ago"


def test_one_of_a_class_above_gets_the_place_of_the_least_urgent_when_all_are_taken(app, alone):
    slow = [Run(app, app.params(seed=n, num_inference_steps=300), f"slow{n}", priority="batch") for n in range(2)]
    clip = long(app, "evicted", priority="batch").at(1)  # the least work left, so it leads
    for run in slow:
        until(lambda run=run: run.started is not None)
    urgent = Run(app, app.params(seed=9, num_inference_steps=2), "urgent", priority="interactive")
    urgent.result()
    sent = [run for run in slow if run.moved is not None]
    assert len(sent) == 1 and clip.moved is None
    for run in slow:
        run.response.cancel()
    assert np.array_equal(clip.result(), alone)
    until(lambda: app.handle("Denoiser").describe.remote().result()["resident"] == 0)


def test_who_leaves_is_gone_from_every_rank_at_the_next_step(app):
    run = Run(app, app.params(num_inference_steps=2000), "leaves").at(3)
    before = app.handle("Denoiser").describe.remote().result()
    assert [rank["samples"] for rank in before["ranks"]] == [1] * app.config.denoiser.parallel.size
    run.response.cancel()

    def gone() -> bool:
        now = app.handle("Denoiser").describe.remote().result()
        return all(rank["samples"] == 0 for rank in now["ranks"])

    until(gone)


def test_latents_that_are_not_finite_fail_their_sample_only(app, alone):
    clip = long(app, "beside").at(1)
    params = app.params(seed=7)
    wild = params.model_copy(update={"guidance_scale": 1e38, "guidance_scale_2": 1e38})
    failure = Run(app, wild, "wild", priority="interactive").failure()
    assert failure.code == "not_finite" and not failure.retryable and "seed 7" in failure.message
    assert np.array_equal(clip.result(), alone)


@pytest.mark.parametrize(
    "blow",
    [pytest.param(signal.SIGKILL, id="killed"), pytest.param(signal.SIGSTOP, id="hung", marks=pytest.mark.slow)],
)
def test_after_a_rank_is_lost_the_sample_goes_on_from_its_last_state_to_the_same_bits(app, alone, blow):
    prefix = f"samples/{blow.name}{app.config.denoiser.parallel.size}"
    folder = app.path(prefix)
    run = long(app, f"first-{blow.name}", state_prefix=prefix)
    until(lambda: any(_step(file) >= 5 for file in folder.glob("*.safetensors")))
    os.kill(max(process.pid for process in processes("ray::Rank")), blow)
    failure = run.failure()
    assert failure.code == "group_lost" and failure.retryable
    assert failure.step is not None and failure.step > 5
    saved = max(_step(file) for file in folder.glob("*.safetensors"))
    for attempt in range(3):
        again = long(app, f"second-{blow.name}-{attempt}", state_prefix=prefix, resume=True)
        again.wait()
        if not (isinstance(again.error, JobFailed) and again.error.code == "worker_lost"):
            break  # otherwise it met the replica that was about to go
    assert np.array_equal(again.result(), alone)
    assert again.started is not None and again.started.step == saved >= 5


# Each way in which bytes can be wrong is in tests/wan/sampling/test_snapshot.py.
@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        pytest.param("foreign", marks=pytest.mark.slow),
        "another request's",
        pytest.param("of another version", marks=pytest.mark.slow),
    ],
)
def test_a_state_that_cannot_be_used_is_refused_and_the_sample_begins_anew(app, alone, damage):
    prefix = f"samples/{damage.replace(' ', '').replace(chr(39), '')}{app.config.denoiser.parallel.size}"
    owner = Run(app, app.params(seed=1 if damage != "another request's" else 8, **LONG), "owner", state_prefix=prefix)
    folder = app.path(prefix)
    until(lambda: any(_step(file) >= 3 for file in folder.glob("*.safetensors")))
    owner.response.cancel()
    until(lambda: app.handle("Denoiser").describe.remote().result()["resident"] == 0)
    (file,) = folder.glob("*.safetensors")
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "foreign":
        file.write_bytes(b"not a state at all")
    elif damage == "of another version":
        assert data.count(b'"version":"1"') == 1
        file.write_bytes(data.replace(b'"version":"1"', b'"version":"0"'))
    run = long(app, f"anew-{damage[:5]}", state_prefix=prefix, resume=True)
    assert np.array_equal(run.result(), alone)
    assert run.started is not None and run.started.step == 0


def test_states_are_replaced_by_newer_ones(app):
    prefix = f"samples/replaced{app.config.denoiser.parallel.size}"
    long(app, "replaced", state_prefix=prefix).result()
    until(lambda: len(list(app.path(prefix).glob("*.safetensors"))) == 1)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_done_one_by_one(deploy):
    """Memory really runs out: the rank's address space is limited from outside before a batch of four comes."""
    app = deploy(
        denoiser={
            "samples_per_step": 4,
            "tokens_per_step": 100_000,
            "fuse_guidance_tokens": 0,
            "batch": {"size": 4, "wait_s": 0.3},
        },
        limits={"num_inference_steps": 2000},
    )
    params = [app.params(seed=n, width=320, height=320, num_frames=33, num_inference_steps=2) for n in range(4)]
    expected = [Run(app, one, f"expected{n}").result() for n, one in enumerate(params)]
    (rank,) = processes("ray::Rank")
    # How much the process kept from the samples before is its allocator's secret, so it is squeezed more and more.
    tokens = 9 * 20 * 20
    for slack in (12, 8, 6, 4):
        limit = rank.memory_info().vms + slack * tokens * 384 * 4
        rank.rlimit(psutil.RLIMIT_AS, (limit, -1))
        runs = [Run(app, one, f"squeezed{slack}-{n}") for n, one in enumerate(params)]
        latents = [run.result() for run in runs]
        told = app.handle("Denoiser").describe.remote().result()
        rank.rlimit(psutil.RLIMIT_AS, (-1, -1))
        for ours, lone in zip(latents, expected, strict=True):
            assert np.linalg.norm(ours - lone) <= 1e-5 * np.linalg.norm(lone)
        if told["out_of_memory"]:
            break
    assert {run.pid for run in processes("ray::Rank")} == {rank.pid}, "the group was lost"
    assert told["out_of_memory"] > 0, "it did not run out of memory"


def _step(file: Any) -> int:
    match = re.match(r"(\d+)-", file.name)
    return int(match[1]) if match else -1
