"""Forecasts of the queue. Its order in Python is held equal to the SQL in test_claim_order.py."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.config import DenoiserConfig
from serve_app.jobs.estimate import Finished, Pace
from serve_app.jobs.forecast import Fleet, Upcoming, boundary_step, forecast
from tests.support.fakes import PARAMS

# A pass takes 1 s, and 1 s for each TFLOP in it; nothing else takes time.
PACE = Pace([Finished(100, 0, 200, 110, 10.0), Finished(100, 0, 200, 104, 4.0)])


def job(name: str, work: float | None = 4.0, **more: Any) -> Upcoming:
    return Upcoming(name, PARAMS.model_dump(), work, **{"effective_deadline": 1e9, **more})


def seconds(jobs: list[Upcoming], fleet: Fleet | None = None, now: float = 0.0) -> dict[str, float]:
    found = forecast(jobs, PACE, fleet or Fleet(1), now)
    return {name: pytest.approx(expected.seconds_left) for name, expected in found.items()}


def test_an_urgent_job_does_not_wait_for_batch_jobs() -> None:
    batch = [job(f"batch{nth}", priority="batch", status="in_progress", stage="denoise") for nth in range(12)]
    found = forecast([*batch, job("mine", priority="interactive")], PACE, Fleet(1), 0.0)
    assert found["mine"].seconds_left == pytest.approx(8) and found["mine"].wait_s == pytest.approx(0)
    assert max(one.seconds_left for one in found.values()) == pytest.approx(13 * 8)


def test_idle_groups() -> None:
    jobs = [job(str(nth)) for nth in range(3)]
    assert seconds(jobs, Fleet(3)) == {"0": 8, "1": 8, "2": 8}
    assert seconds(jobs, Fleet(2)) == {"0": 8, "1": 8, "2": 16}


def test_shared_passes() -> None:
    jobs = [job(str(nth)) for nth in range(4)]
    assert seconds(jobs, Fleet(1, denoiser=DenoiserConfig(samples_per_step=4))) == {str(nth): 20 for nth in range(4)}


def test_steps_that_a_job_has_behind_it() -> None:
    running = job("running", status="in_progress", stage="denoise", step=3)
    assert seconds([running]) == {"running": 2}
    assert seconds([job("resumed", saved_step=2)]) == {"resumed": 4}
    assert seconds([job("nearly", saved_step=4)]) == {"nearly": 0}


def test_finishing_comes_on_top_of_what_a_plain_video_takes() -> None:
    plain = {"encode": 0.0, "denoise": 150.0, "decode": 40.0, "store": 10.0}
    finished = [
        Finished(100, 0, 200, 110, 10.0, 1.0, plain),
        Finished(100, 0, 206, 104, 4.0, 1.0, {**plain, "finish": 9.0}),
    ]
    pace = Pace(finished)
    assert (pace.other_s, pace.finish_s) == (0.0, 6.0), "three of the nine seconds were beside the decode"
    asked = {"interpolate": {"fps": 32}}
    jobs = [job("plain"), job("finished", finish=asked)]
    alone = {one.id: forecast([one], pace, Fleet(1), 0.0)[one.id].seconds_left for one in jobs}
    assert alone["finished"] - alone["plain"] == pytest.approx(6)
    running = job("running", status="in_progress", stage="finish", step=65, saved_step=2, finish=asked)
    assert forecast([running], pace, Fleet(1), 0.0)["running"].seconds_left == pytest.approx(3)


def test_a_start_time_and_places() -> None:
    assert seconds([job("later", not_before=50.0)], now=10.0) == {"later": 48}
    few = seconds([job("a", effective_deadline=5), job("b", 1.0, effective_deadline=6)], Fleet(1, places=1))
    assert few == {"a": 8, "b": 13}  # inside of a group the smaller one would have gone first


def test_what_is_not_known() -> None:
    assert forecast([job("a")], PACE, Fleet(None), 0.0) == forecast([job("a")], PACE, Fleet(0), 0.0) == {}
    assert forecast([job("a")], Pace(), Fleet(1), 0.0) == {}
    assert forecast([job("a", work=None)], PACE, Fleet(1), 0.0)["a"].seconds_left == pytest.approx(4 + 100)


@pytest.mark.parametrize("steps, shift, ratio", [(40, 12.0, 0.875), (20, 5.0, 0.9), (4, 3.0, 0.5), (30, 1.0, 0.0)])
def test_about_the_step_at_which_the_experts_change(steps: int, shift: float, ratio: float) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")
    scheduler.set_timesteps(steps)
    exact = int((scheduler.timesteps >= ratio * 1000).sum())
    asked = PARAMS.model_copy(update={"num_inference_steps": steps, "flow_shift": shift, "boundary_ratio": ratio})
    assert abs(boundary_step(asked) - exact) <= 1
