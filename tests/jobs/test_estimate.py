"""Estimates: only from what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update

from serve_app.db.tables import Job
from serve_app.events import Done, Progress
from serve_app.jobs.estimate import Finished, Pace
from serve_app.jobs.store import JobStore
from serve_app.request import Params, Urgency
from serve_app.wan.cost import step_flops, video_tflop
from tests.support.fakes import PARAMS
from tests.support.shapes import A14B


def test_nothing_known_nothing_said() -> None:
    for pace in (Pace(), Pace([Finished(5, 3, 3)])):
        assert (pace.work_per_s, pace.seconds_per_job, pace.seconds_left(100, 10)) == (None, None, None)


def test_one_after_the_other() -> None:
    pace = Pace([Finished(100, 0, 10), Finished(100, 10, 20), Finished(100, 500, 510)])  # idle in between
    assert (pace.work_per_s, pace.seconds_per_job) == (10, 10)
    assert pace.seconds_left(ahead=300, work=100) == 40


def test_side_by_side() -> None:
    """Four groups: each job takes 10 s, four end in that time."""
    pace = Pace([Finished(100, 0, 10) for _ in range(4)] + [Finished(100, 5, 10)])
    assert (pace.work_per_s, pace.seconds_per_job) == (50, 2)
    assert pace.seconds_left(ahead=0, work=100) == 9  # its own time does not shrink with the number of groups
    assert pace.seconds_left(ahead=500, work=100) == 19


def test_a_later_start() -> None:
    pace = Pace([Finished(100, 0, 10)])
    assert pace.seconds_left(ahead=300, work=100, begins_in_s=20) == 40  # others are at work until then
    assert pace.seconds_left(ahead=300, work=100, begins_in_s=500) == 510


def test_like_size() -> None:
    """The time that does not grow with work weighs more in small jobs than in large ones."""
    pace = Pace([Finished(100, 0, 1), Finished(10_000, 1, 501)])
    assert pace.seconds_left(0, 120) == 1.2
    assert pace.seconds_left(0, 20_000) == 1000


def sized(width: int, height: int, frames: int = 81, steps: int = 40) -> Params:
    size = {"width": width, "height": height, "num_frames": frames, "num_inference_steps": steps}
    return PARAMS.model_copy(update=size)


def pixels(params: Params) -> float:
    """Return the work of a video if it grew with the pixels."""
    return float(params.width * params.height * params.num_frames * params.num_inference_steps)


def estimated(measured: Params, seconds: float, asked: Params, work: Callable[[Params], float]) -> float:
    """The time of one job from that of three others, by one measure of work or another."""
    pace = Pace([Finished(work(measured), seconds * nth, seconds * (nth + 1)) for nth in range(3)])
    left = pace.seconds_left(0, work(asked))
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


async def test_from_the_store(store: JobStore, monkeypatch) -> None:
    monkeypatch.setattr("serve_app.jobs.queries._PACE_S", 0)
    ids = [(await store.create(PARAMS, "wan")).id for _ in range(6)]
    jobs = [await store.get(video_id) for video_id in ids]
    assert jobs[5] is not None and jobs[5].work == video_tflop(A14B, PARAMS)
    assert await store.seconds_left(jobs[5]) is None
    for _ in range(4):
        await store.claim("me", 60)
    for video_id in ids[:2]:
        await store.complete(video_id, 1, Done({}, {"denoise": 1}, 1))
    async with store._db.write() as session:  # one after the other, 10 s each
        for nth, video_id in enumerate(ids[:2]):
            times = {"started_at": 1e9 + 10 * nth, "completed_at": 1e9 + 10 * nth + 10}
            await session.execute(update(Job).where(Job.id == video_id).values(times))
        # A second attempt's time says nothing of the whole.
        await session.execute(update(Job).where(Job.id == ids[3]).values(attempt=2, status="completed", started_at=1.0))
        await session.execute(update(Job).where(Job.id == ids[3]).values(completed_at=1e10))
    await store.progress(ids[2], 1, Progress("denoise", 2, 4))
    running = await store.get(ids[2])
    assert running is not None and running.progress == 47
    for job, ahead in ((jobs[4], 0), (jobs[5], 1)):
        assert job is not None
        left = await store.seconds_left(job)
        assert left is not None and abs(left - (5.3 + 10 * ahead + 10)) < 1e-6


async def test_others_count_as_in_the_position(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners take turns: not all jobs of a flood are in front of an owner who came after it."""
    monkeypatch.setattr("serve_app.jobs.queries._PACE_S", 0)
    done = await store.create(PARAMS, "wan")
    await store.claim("me", 60)
    await store.complete(done.id, 1, Done({}, {}, 1))
    async with store._db.write() as session:
        await session.execute(update(Job).values(started_at=1e9, completed_at=1e9 + 10))
    flood = [await store.create(PARAMS, "wan", owner="flood") for _ in range(5)]
    mine = [await store.create(PARAMS, "wan", owner="me") for _ in range(2)]
    other = await store.create(PARAMS, "wan", owner="other")
    for job, place in ((flood[0], 3), (flood[4], 8), (mine[0], 3), (mine[1], 5), (other, 3)):
        assert await store.position(job.id) == place
        assert await store.seconds_left(job) == pytest.approx(10 * place)
    later = await store.create(PARAMS, "wan", Urgency(start_at=time.time() + 1000), owner="me")
    left = await store.seconds_left(later)
    assert left is not None and 900 < left < 1010


async def test_whoever_does_not_know_the_model(
    store: JobStore, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs are taken for average ones, and tell nothing when they are done."""
    monkeypatch.setattr("serve_app.jobs.queries._PACE_S", 0)
    stranger = JobStore(store_url)
    await stranger.start()
    for _ in range(2):
        done = await stranger.create(PARAMS, "wan")
        await store.claim("me", 60)
        await store.complete(done.id, 1, Done({}, {}, 1))
        assert done.work is None and not (await store.pace()).finished
    for nth, steps in enumerate((4, 12)):
        done = await store.create(PARAMS.model_copy(update={"num_inference_steps": steps}), "wan")
        await store.claim("me", 60)
        await store.complete(done.id, 1, Done({}, {}, 1))
        async with store._db.write() as session:
            times = {"started_at": 1e9 + 10 * nth, "completed_at": 1e9 + 10 * nth + 10}
            await session.execute(update(Job).where(Job.id == done.id).values(times))
    waiting = [await stranger.create(PARAMS, "wan"), await store.create(PARAMS, "wan")]
    assert await stranger.seconds_left(waiting[0]) == pytest.approx(10)  # 8 steps
    assert await stranger.seconds_left(waiting[1]) == pytest.approx(15)
    await stranger.close()
