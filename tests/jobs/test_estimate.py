"""Estimates: only from what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update

from serve_app.config import Ageing
from serve_app.db.tables import Job, Replicas
from serve_app.errors import DeadlineInfeasible
from serve_app.events import Done, Progress
from serve_app.jobs.estimate import Finished, Pace
from serve_app.jobs.forecast import Fleet, Upcoming, forecast
from serve_app.jobs.store import Idempotency, JobStore, WaitTooLong
from serve_app.request import Params, Urgency
from serve_app.wan.cost import step_flops, video_tflop
from tests.support.fakes import PARAMS
from tests.support.shapes import A14B


def test_nothing_known_nothing_said() -> None:
    for pace in (Pace(), Pace([Finished(5, 3, 3)])):
        assert not pace.known
        assert (pace.work_per_s, pace.work_per_group_s, pace.seconds_per_job, pace.pass_cost) == (None,) * 4
        assert alone(pace, PARAMS, 10) is None


def test_one_after_the_other() -> None:
    pace = Pace([Finished(100, 0, 10), Finished(100, 10, 20), Finished(100, 500, 510)])  # idle in between
    assert (pace.work_per_s, pace.work_per_group_s, pace.seconds_per_job) == (10, 10, 10)


def test_side_by_side() -> None:
    """Four groups: each job takes 10 s, four end in that time."""
    pace = Pace([Finished(100, 0, 10) for _ in range(4)])
    assert (pace.work_per_s, pace.work_per_group_s, pace.seconds_per_job) == (40, 10, 2.5)
    assert alone(pace, PARAMS, 100) == pytest.approx(10)  # its own time does not shrink with the number of groups


def test_cost_of_a_pass() -> None:
    """Every pass takes 0.1 s and 1 s for ten TFLOP; two of three jobs shared passes."""
    shares = ((100, 20.0), (100, 10.0), (400, 5.0))
    pace = Pace([Finished(work, 0, 99, 0.1 * passes + work / 10, passes) for work, passes in shares])
    assert pace.pass_cost is not None
    assert (pace.pass_cost.fixed_s, pace.pass_cost.per_work_s) == (pytest.approx(0.1), pytest.approx(0.1))


def test_all_jobs_alike() -> None:
    """Of equal jobs nobody can tell what is fixed, and any of them is predicted right."""
    pace = Pace([Finished(100, 0, 99, 12, 20.0) for _ in range(3)])
    assert alone(pace, PARAMS, 100) == pytest.approx(12)


def test_decoders_and_what_is_between() -> None:
    timings = [{"encode": 1.0, "denoise": 10.0, "decode": 2.0 + pixels / 1e6, "store": 0.0} for pixels in (1e6, 8e6)]
    jobs = [Finished(9, 0, 15 + t["decode"], 10, 4.0, p, t) for t, p in zip(timings, (1e6, 8e6), strict=True)]
    pace = Pace(jobs)
    assert (pace.encode_s, pace.other_s) == (1, pytest.approx(4))
    assert pace.decode_s(3e6) == pytest.approx(5)


def test_how_right_predictions_are() -> None:
    assert Pace(ratios=[2.0] * 9).p90_factor == 1  # too few to say
    pace = Pace(ratios=[0.8] * 5 + [1.25] * 4 + [3.0])
    assert pace.p90_factor == 1.25
    assert pace.errors[0] == pytest.approx(0.2) and pace.errors[-1] == pytest.approx(2 / 3)


def alone(pace: Pace, params: Params, work: float) -> float | None:
    """Return the seconds of a job on an idle server."""
    found = forecast([Upcoming("a", params.model_dump(), work)], pace, Fleet(1), 0.0)
    return found["a"].seconds_left if found else None


def sized(width: int, height: int, frames: int = 81, steps: int = 40) -> Params:
    size = {"width": width, "height": height, "num_frames": frames, "num_inference_steps": steps}
    return PARAMS.model_copy(update=size)


def pixels(params: Params) -> float:
    """Return the work of a video if it grew with the pixels."""
    return float(params.width * params.height * params.num_frames * params.num_inference_steps)


def estimated(measured: Params, seconds: float, asked: Params, work: Callable[[Params], float]) -> float:
    """The time of one job from that of three others, by one measure of work or another."""
    pace = Pace([Finished(work(measured), seconds * nth, seconds * (nth + 1)) for nth in range(3)])
    left = alone(pace, asked, work(asked))
    assert left is not None
    return left


def test_720p_from_480p() -> None:
    """Attention grows with the square of the tokens: 2.3 times the pixels are 3.9 times the work."""
    small, large = sized(832, 480), sized(1280, 720)
    assert pixels(large) / pixels(small) == pytest.approx(2.31, abs=0.01)
    assert estimated(small, 100, large, pixels) == pytest.approx(231, abs=1)
    assert estimated(small, 100, large, lambda params: video_tflop(A14B, params)) == pytest.approx(389, abs=1)


SIZES = st.builds(
    sized,
    st.integers(10, 80).map(lambda side: 16 * side),
    st.integers(10, 80).map(lambda side: 16 * side),
    st.integers(0, 30).map(lambda frames: 4 * frames + 1),
    st.integers(1, 60),
)


@given(SIZES, SIZES)
def test_one_size_from_another(measured: Params, asked: Params) -> None:
    """On a machine that does the same number of operations every second, whatever the size."""

    def truth(params: Params) -> float:
        tokens = ((params.num_frames - 1) // 4 + 1) * (params.height // 16) * (params.width // 16)
        return params.num_inference_steps * step_flops(A14B, tokens, params.guided) / 1e15

    expected = truth(asked)
    ours = estimated(measured, truth(measured), asked, lambda params: video_tflop(A14B, params))
    assert ours == pytest.approx(expected)
    by_pixels = estimated(measured, truth(measured), asked, pixels)
    assert abs(ours - expected) <= abs(by_pixels - expected) + 1e-9 * expected


@pytest.fixture(autouse=True)
def _always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PACE_S", "_FORECAST_S"):
        monkeypatch.setattr(f"serve_app.jobs.outlook.{name}", 0)


async def finish(store: JobStore, params: Params = PARAMS, nth: int = 0, **done: Any) -> Job:
    """Create and complete a job that took 10 s."""
    job = await store.create(params, "wan")
    assert await store.claim("me", 60) is not None
    await store.complete(job.id, 1, Done({}, {}, 1, **done))
    async with store._db.write() as session:
        times = {"started_at": 1e9 + 10 * nth, "completed_at": 1e9 + 10 * nth + 10}
        await session.execute(update(Job).where(Job.id == job.id).values(times))
    return job


async def left(store: JobStore, video_id: str) -> float:
    job = await store.get(video_id)
    assert job is not None
    seconds = await store.seconds_left(job)
    assert seconds is not None
    return seconds


async def test_from_the_store(store: JobStore) -> None:
    first = await store.create(PARAMS, "wan")
    assert first.work == video_tflop(A14B, PARAMS) and first.predicted_s is None
    assert await store.seconds_left(first) is None
    await store.delete(first.id)
    for nth in range(2):
        await finish(store, nth=nth)
    ids = [(await store.create(PARAMS, "wan")).id for _ in range(3)]
    for nth, video_id in enumerate(ids):
        job = await store.get(video_id)
        assert job is not None and job.predicted_s == pytest.approx(10 * nth + 10)
    await store.claim("me", 60)
    await store.progress(ids[0], 1, Progress("denoise", 2, 4))
    for nth, video_id in enumerate(ids):  # half of the first one is left
        assert await left(store, video_id) == pytest.approx(5 + 10 * nth, abs=0.5)


async def test_a_second_attempt_tells_nothing_and_goes_on_where_it_was(store: JobStore) -> None:
    await finish(store)
    job = await store.create(PARAMS, "wan")
    await store.claim("me", 60)
    await store.progress(job.id, 1, Progress("denoise", 3, 4, saved_step=3))
    await store.release(job.id, 1)
    assert await left(store, job.id) == pytest.approx(2.5)
    await store.claim("me", 60)
    await store.complete(job.id, 2, Done({}, {}, 1))
    assert len((await store.pace()).finished) == 1


async def test_others_count_as_in_the_order(store: JobStore) -> None:
    """Owners take turns: not all jobs of a flood are in front of an owner who came after it."""
    await finish(store)
    store._fleet = store._plan = Fleet(1, places=1)
    store._ageing = Ageing(interactive=0, standard=0, batch=0)
    flood = [await store.create(PARAMS, "wan", owner="flood") for _ in range(5)]
    mine = [await store.create(PARAMS, "wan", owner="me") for _ in range(2)]
    for job, place in ((flood[0], 1), (mine[0], 2), (flood[1], 3), (mine[1], 4), (flood[4], 7)):
        assert await left(store, job.id) == pytest.approx(10 * place)
    later = await store.create(PARAMS, "wan", Urgency(start_at=time.time() + 1000), owner="me")
    assert 1000 < await left(store, later.id) < 1011


async def test_far_back_in_the_queue(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs beyond those that are looked at one by one count by their work."""
    await finish(store)
    monkeypatch.setattr("serve_app.jobs.outlook._IN_DETAIL", 2)
    jobs = [await store.create(PARAMS, "wan") for _ in range(6)]
    for nth, job in enumerate(jobs):
        assert job.predicted_s == pytest.approx(10 * nth + 10)
        assert await left(store, job.id) == pytest.approx(10 * nth + 10)


async def test_groups_that_were_reported(store: JobStore) -> None:
    await finish(store)
    await store.report_replicas("wan", {"Encoder": 1, "Denoiser": 2, "Decoder": 1})
    jobs = [await store.create(PARAMS, "wan") for _ in range(4)]
    assert [round(await left(store, job.id)) for job in jobs] == [10, 10, 20, 20]
    await store.report_replicas("wan", {"Encoder": 1, "Denoiser": 0, "Decoder": 1})
    assert await store.seconds_left(jobs[0]) is None  # how long a start takes is not known
    await store.report_replicas("other", {"Denoiser": 7})
    assert await store.seconds_left(jobs[0]) is None


async def test_an_old_report_is_not_believed(store: JobStore) -> None:
    await finish(store)
    await store.report_replicas("wan", {"Denoiser": 0})
    async with store._db.write() as session:
        await session.execute(update(Replicas).values(at=Replicas.at - 60))
    job = await store.create(PARAMS, "wan")
    assert await left(store, job.id) == pytest.approx(10)


async def test_a_deadline_that_cannot_be_met(store: JobStore) -> None:
    asked: dict[str, Any] = {"check_deadline": True}
    unknown = await store.create(PARAMS, "wan", Urgency(deadline_s=0.1), **asked)
    await store.delete(unknown.id)
    for nth in range(2):
        await finish(store, nth=nth)
    first = await store.create(PARAMS, "wan", Urgency(deadline_s=11), **asked)
    with pytest.raises(DeadlineInfeasible) as refused:
        await store.create(PARAMS, "wan", Urgency(deadline_s=19), **asked)
    assert refused.value.earliest_s == 20 and refused.value.param == "deadline_s"
    await store.create(PARAMS, "wan", Urgency(deadline_s=19))  # the caller does not ask for the check
    named = Idempotency("a", "digest")
    late = Urgency(deadline_s=31)
    before = await store.create(PARAMS, "wan", late, idempotency=named, **asked)
    await store.create(PARAMS, "wan", owner="flood")
    again = await store.create(PARAMS, "wan", Urgency(deadline_s=1), idempotency=named, **asked)
    assert again.id == before.id != first.id  # a retry is not checked again


async def test_a_class_that_would_wait_too_long(store: JobStore) -> None:
    await finish(store)
    for _ in range(2):
        await store.create(PARAMS, "wan", max_wait_s=15)
    with pytest.raises(WaitTooLong) as refused:
        await store.create(PARAMS, "wan", max_wait_s=15)
    assert refused.value.retry_after_s == pytest.approx(5, abs=0.5)
    # Those who wait for the others only by their own choice do not wait for others.
    await store.create(PARAMS, "wan", Urgency(start_at=time.time() + 100), max_wait_s=15)
    store._ageing = Ageing(interactive=0)
    urgent = await store.create(PARAMS, "wan", Urgency(priority="interactive"), max_wait_s=5)
    assert urgent.predicted_s == pytest.approx(10)


async def test_whoever_does_not_know_the_model(store: JobStore, store_url: str) -> None:
    """Its jobs are taken for average ones, and tell nothing when they are done."""
    stranger = JobStore(store_url)
    await stranger.start()
    done = await finish(stranger)
    assert done.work is None and not (await store.pace()).finished
    for nth, steps in enumerate((4, 12)):
        await finish(store, PARAMS.model_copy(update={"num_inference_steps": steps}), nth)
    waiting = [await stranger.create(PARAMS, "wan"), await store.create(PARAMS, "wan")]
    known, both = await left(stranger, waiting[1].id), await left(stranger, waiting[0].id)
    assert known < both == pytest.approx(3 * known)  # 4 steps go first, and 8 are the average
    await stranger.close()
