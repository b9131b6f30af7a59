from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app import config
from serve_app.db.notifications import Event
from serve_app.db.tables import Garbage, Job, new_id
from serve_app.errors import JobFailed
from serve_app.jobs.transitions import attempt_failed, delay_s

OPTIONS = config.DispatcherConfig(max_attempts=3, group_losses=2, retry_s=5)
NOW = 1000.0


def running(attempt: int = 1) -> Job:
    video_id, _ = new_id()
    return Job(
        id=video_id,
        status="in_progress",
        attempt=attempt,
        failures=0,
        interruptions=0,
        started_at=NOW - 100,
        resumed_step=0,
        losses=0,
        lost_step=None,
        cancel_requested=False,
    )


def lost(step: int | None = None, code: str = "decoder_lost") -> JobFailed:
    return JobFailed(code if step is None else "group_lost", "A rank was lost.", retryable=True, step=step)


def fail(
    job: Job, step: int | None = None, *, resumed_step: int = 0, options: config.DispatcherConfig = OPTIONS
) -> float:
    """Fails the current attempt. Seconds until the next one, -1 if there will be none."""
    rows = attempt_failed(job, NOW, lost(step), resumed_step, options, 600)
    prefixes = {row.prefix for row in rows if isinstance(row, Garbage)}
    assert prefixes == ({f"videos/{job.id}", f"samples/{job.id}"} if job.finished else set())
    events = [(row.type, row.video_id) for row in rows if isinstance(row, Event)]
    assert events == ([("video.failed", job.id)] if job.finished else [])
    if job.finished:
        return -1
    wait_s = job.not_before - NOW
    job.status, job.attempt = "in_progress", job.attempt + 1
    return wait_s


def test_attempts_that_begin_no_further_are_bounded() -> None:
    job = running()
    assert [fail(job) for _ in range(3)] == [0, 5, -1]
    assert (job.error_code, job.failures) == ("decoder_lost", 3)
    assert job.error_message == "A rank was lost. Gave up after 3 attempts in a row."


def test_an_attempt_that_began_further_forgives_the_failures_before() -> None:
    job = running()
    assert [fail(job), fail(job)] == [0, 5]
    assert [fail(job, resumed_step=10), fail(job, resumed_step=10)] == [0, 5]
    assert (job.resumed_step, job.failures) == (10, 2)
    assert fail(job, resumed_step=4) == -1  # its states were lost, so this one began earlier: no progress


def test_the_step_that_loses_its_group_again_is_poisonous() -> None:
    job = running()
    assert fail(job, 7) == 0
    assert fail(job, 7, resumed_step=6) == -1
    assert (job.error_code, job.losses) == ("poisonous", 2)
    assert job.error_message == "The workers were lost 2 times during step 7 of this video; it is not tried again."


@pytest.mark.parametrize("code", ["group_lost", "worker_lost", "lease_expired"])
def test_what_is_lost_around_a_job_is_not_held_against_it(code: str) -> None:
    job = running()
    options = OPTIONS.model_copy(update={"max_interruptions": 20})
    for _ in range(19):
        assert attempt_failed(job, NOW, lost(code=code), 0, options, 600) == []
        assert (job.status, job.not_before, job.failures) == ("queued", NOW, 0)
        job.status, job.started_at = "in_progress", NOW - 6
    assert attempt_failed(job, NOW, lost(code=code), 0, options, 600)
    assert (job.status, job.error_message) == ("failed", "A rank was lost. Gave up after 20 interruptions.")


def test_after_an_attempt_that_was_cut_short_at_once_there_is_a_pause() -> None:
    job = running()
    job.started_at = NOW - 1
    attempt_failed(job, NOW, lost(code="worker_lost"), 0, OPTIONS, 600)
    assert job.not_before == NOW + 5


def test_losses_at_other_steps_do_not_add_up() -> None:
    job = running()
    for step in range(1, 30):
        assert fail(job, step, resumed_step=step - 1 or 0) >= 0, step
    assert (job.lost_step, job.losses) == (29, 1)


def test_other_failures_do_not_clear_a_step_of_suspicion() -> None:
    job = running()
    fail(job, 7)
    fail(job, None)
    assert fail(job, 7) == -1
    assert job.error_code == "poisonous"


def test_bounds_of_one() -> None:
    job = running()
    assert fail(job, 7, options=OPTIONS.model_copy(update={"group_losses": 1})) == -1
    assert job.error_message == "The workers were lost once during step 7 of this video; it is not tried again."
    job = running()
    assert fail(job, options=OPTIONS.model_copy(update={"max_attempts": 1})) == -1
    assert job.error_message == "A rank was lost. Gave up after 1 attempt."


def test_a_cancelled_job_is_not_tried_again() -> None:
    job = running()
    job.cancel_requested = True
    assert fail(job) == -1
    assert job.error_code == "cancelled"


@pytest.mark.parametrize(
    ("failures", "expected"), [(0, 0), (1, 0), (2, 5), (3, 10), (4, 20), (5, 40), (6, 60), (7, 60), (5000, 60)]
)
def test_delays(failures: int, expected: float) -> None:
    assert delay_s(failures, 5) == expected


STEPS = 6
FAILURES = st.tuples(st.integers(0, STEPS), st.none() | st.integers(1, STEPS))


@given(st.lists(FAILURES, min_size=(STEPS + 1) * 3))
def test_whatever_happens_a_job_ends(failures: list[tuple[int, int | None]]) -> None:
    """Every `max_attempts` failures the furthest beginning has to move on, and it can do so once for each step."""
    job = running()
    for count, (resumed_step, step) in enumerate(failures, 1):
        if fail(job, step, resumed_step=resumed_step) < 0:
            assert count <= (STEPS + 1) * OPTIONS.max_attempts
            return
    raise AssertionError("it was tried for ever")
