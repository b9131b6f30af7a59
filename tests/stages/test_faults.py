"""Faults: a dead or hung rank or replica is replaced, a slow one is left alone, and who leaves frees the ranks."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import ray
from ray import serve

from serve_app.engine.group import call_ranks
from serve_app.engine.sample_request import SampleRequest
from serve_app.events import Done, Progress
from serve_app.job_spec import JobSpec
from serve_app.replica import this_process
from tests.stages.conftest import Wan, processes, until


@pytest.fixture
def app(pair: Wan) -> Wan:
    return pair


def ranks() -> dict[int, psutil.Process]:
    return {process.pid: process for process in processes("ray::Rank")}


def make(app: Wan, **fields) -> Done:
    last = list(app.pipeline.generate.remote(app.job(**fields)))[-1]
    assert isinstance(last, Done)
    return last


def make_soon(app: Wan, timeout_s: float = 240) -> Done:
    """Make a video as soon as the denoiser is back; until then requests may fail."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return make(app)
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


# That a killed one is replaced as well, tests/stages/test_engine.py sees where its sample is resumed.
@pytest.mark.parametrize(
    "blow",
    [pytest.param(signal.SIGKILL, id="killed", marks=pytest.mark.slow), pytest.param(signal.SIGSTOP, id="hung")],
)
def test_a_rank_that_is_gone_takes_its_group_along_and_a_new_group_comes(app, blow):
    make_soon(app)
    before = ranks()
    assert len(before) == 2
    stream = iter(app.pipeline.generate.remote(app.job(num_inference_steps=2000)))
    while not (isinstance(event := next(stream), Progress) and event.stage == "denoise" and event.step > 1):
        pass
    os.kill(max(before), blow)
    with pytest.raises(Exception) as failure:
        list(stream)
    from serve_app.dispatch.deployment import translate

    assert getattr(translate(failure.value), "retryable", False), repr(failure.value)
    make_soon(app)
    until(lambda: not any(process.is_running() for process in before.values()))
    assert len(ranks()) == 2 and not set(ranks()) & set(before)


def test_a_long_step_is_not_taken_for_a_hang(app):
    """One step here takes longer than several health checks may."""
    before = set(ranks())
    limit = 1.5 * app.config.denoiser.health_check_timeout_s
    for frames in (81, 161):  # a fast machine needs the longer one
        params = app.params(width=480, height=480, num_frames=frames, num_inference_steps=1)
        encoded = app.handle("Encoder").encode.remote(params.prompt, params.negative_prompt)
        stream = (
            app.handle("Denoiser").options(stream=True).denoise.remote(SampleRequest(f"long-{frames}", params), encoded)
        )
        seconds = list(stream)[-1].seconds
        if seconds > limit:
            break
    assert seconds > limit, f"a step of {seconds:.1f} s proves nothing"
    assert set(ranks()) == before


def test_who_leaves_frees_the_ranks_at_the_next_step(app):
    denoiser = app.handle("Denoiser")
    response = app.pipeline.generate.remote(app.job(num_inference_steps=2000))
    stream = iter(response)
    while not (isinstance(event := next(stream), Progress) and event.stage == "denoise" and event.step > 1):
        pass
    assert denoiser.describe.remote().result()["resident"] == 1
    response.cancel()
    until(lambda: denoiser.describe.remote().result()["resident"] == 0)
    steps = denoiser.describe.remote().result()["steps"]
    make(app, num_inference_steps=3)
    # The step that was under way when it left may end after it.
    assert denoiser.describe.remote().result()["steps"] <= steps + 1 + 3, "the cancelled sample went on"


@ray.remote(num_cpus=0)
class Busy:
    """A rank in a step: other calls have to wait."""

    def work(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


@ray.remote(num_cpus=0)
class Coordinator:
    """Calls a rank on behalf of a request."""

    async def request(self, rank) -> None:
        self._answers = [*call_ranks([rank], "work", 2.0), *call_ranks([rank], "work", 0.0)]
        await asyncio.Event().wait()

    async def called(self) -> bool:
        return hasattr(self, "_answers")

    async def answers(self) -> list[float]:
        return await asyncio.gather(*self._answers)


def test_a_request_that_is_cancelled_takes_no_call_to_a_rank_along(app):
    coordinator = Coordinator.remote()
    request = coordinator.request.remote(Busy.remote())
    until(lambda: ray.get(coordinator.called.remote()))
    ray.cancel(request, recursive=True)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(request)
    assert ray.get(coordinator.answers.remote()) == [2.0, 0.0]


@ray.remote(num_cpus=0)
class Driver:
    """Drives a job from a process of its own, as a dispatcher does."""

    def pid(self) -> int:
        return os.getpid()

    async def drive(self, job: JobSpec) -> None:
        pipeline = serve.get_app_handle("wan").options(stream=True)
        async for _ in pipeline.generate.remote(job, this_process()):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "pipeline"])
def test_when_the_caller_dies_its_work_ends_on_every_rank(app, victim):
    denoiser = app.handle("Denoiser")
    driver = Driver.remote()
    pid = ray.get(driver.pid.remote())
    done = driver.drive.remote(app.job(num_inference_steps=2000))
    until(lambda: denoiser.describe.remote().result()["resident"] == 1)
    os.kill(pid if victim == "driver" else processes("ray::ServeReplica:wan:Pipeline")[0].pid, signal.SIGKILL)
    until(lambda: all(rank["samples"] == 0 for rank in denoiser.describe.remote().result()["ranks"]))
    with pytest.raises(ray.exceptions.RayError):
        ray.get(done)
    make_soon(app)


@pytest.mark.slow
def test_more_samples_than_places_all_finish_and_who_leaves_while_waiting_is_forgotten(deploy):
    app = deploy(denoiser={"resident_samples": 1, "batch": {"size": 4, "wait_s": 0.3}})
    denoiser = app.handle("Denoiser")
    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(make, app, seed=seed) for seed in range(4)]
        waiting = app.pipeline.generate.remote(app.job(seed=9))
        pool.submit(drain, waiting)
        time.sleep(0.1)  # whatever it is at by now, it must be gone afterwards
        waiting.cancel()
        assert all(job.result(timeout=60).outputs for job in jobs)
    until(lambda: denoiser.describe.remote().result()["resident"] == 0)
    make(app)


def drain(response) -> None:
    try:
        for _ in response:
            pass
    except Exception:
        return
