"""Two pipelines on one store: who gets which, what a canary is blamed for, and how a trial ends."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from sqlalchemy import select

from serve_app.config import CanaryConfig
from serve_app.db.notifications import Event
from serve_app.db.rollouts import ServedPipeline
from serve_app.db.tables import Job, new_id
from serve_app.errors import JobFailed, ServeAppError
from serve_app.events import Done, Progress
from serve_app.jobs.assignment import share
from serve_app.jobs.rollouts import AWAY_S
from serve_app.jobs.store import JobStore
from tests.support.claiming import DONE, LOST, OPTIONS, claim, get
from tests.support.clock import MovableClock
from tests.support.fakes import PARAMS

TRIAL = CanaryConfig(start_within_s=60, bake_s=0)
BROKEN = JobFailed("internal_error", "It broke.")
# Owners whose jobs go to a canary called `next` with 50 %, and those whose jobs stay.
THEIRS = [owner for owner in map(str, range(100)) if share("next", owner) < 50][:10]
OURS = [owner for owner in map(str, range(100)) if share("next", owner) >= 50][:10]


# For tests of what is the same on both databases.
one_database = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)


async def create(store: JobStore, owner: str, **more: str) -> Job:
    return await store.create(PARAMS, "wan", owner=owner, **more)  # type: ignore[arg-type]


async def begun(store: JobStore, owner: str, **more: str) -> Job:
    """Create a job and claim it."""
    job = await create(store, owner, **more)
    claimed = await claim(store)
    assert claimed.id == job.id
    return claimed


async def state(store: JobStore, name: str) -> ServedPipeline:
    row = (await store.rollout()).find(name)
    assert row is not None
    return row


@pytest.fixture
async def trial(store: JobStore) -> JobStore:
    """A store with a canary that gets half of the owners."""
    await store.seed("wan", {"wan": 50, "next": 50})
    return store


@one_database
async def test_without_a_canary_jobs_have_no_pipeline(store: JobStore) -> None:
    await store.seed("wan", {})
    assert (await begun(store, THEIRS[0])).pipeline is None
    assert (await store.rollout()).rows == [] and await store.judge(TRIAL) is None


async def test_owners_are_shared_out_by_hash(trial: JobStore) -> None:
    for owner in (*THEIRS[:4], *OURS[:4]):
        await create(trial, owner)
    found: Counter[tuple[bool, str | None]] = Counter()
    for _ in range(8):
        job = await claim(trial)
        found[(job.owner in THEIRS, job.pipeline)] += 1
    assert found == {(True, "next"): 4, (False, "wan"): 4}


@one_database
async def test_a_job_keeps_its_pipeline_for_life(trial: JobStore) -> None:
    job = await begun(trial, THEIRS[0])
    await trial.release(job.id, 1)
    await trial.set_canary("next", 0, "wan")
    assert (await claim(trial)).pipeline == "next"
    assert (await begun(trial, THEIRS[0])).pipeline == "wan"


@one_database
async def test_remixes_follow_their_source(trial: JobStore) -> None:
    source = await begun(trial, THEIRS[0])
    assert (await begun(trial, OURS[0], remixed_from=source.id)).pipeline == "next"
    source = await begun(trial, OURS[1])
    assert (await begun(trial, THEIRS[1], remixed_from=source.id)).pipeline == "wan"


@one_database
async def test_the_file_only_seeds_the_shares(trial: JobStore) -> None:
    await trial.set_canary("next", 10, "wan")
    await trial.seed("wan", {"wan": 50, "next": 50})
    assert (await state(trial, "next")).percent == 10
    await trial.abort("next", "Bad.")
    await trial.seed("wan", {"wan": 50, "next": 50})
    assert (await state(trial, "next")).state == "aborted"


async def test_dispatchers_that_start_at_once_seed_once(store: JobStore, store_url: str) -> None:
    other = JobStore(store_url)
    await other.start()
    await asyncio.gather(*(one.seed("wan", {"wan": 9, "next": 1}) for one in (store, other, store, other)))
    assert [(row.name, row.percent) for row in (await store.rollout()).rows] == [("wan", 0), ("next", 10)]
    await other.close()


@one_database
@pytest.mark.parametrize(
    ("name", "percent", "message"),
    [
        ("wan", 5, "NAME has value 'wan', the stable pipeline's, expected another one's"),
        ("third", 5, "NAME has value 'third', expected 'next', which is on trial"),
        ("next", 101, "PERCENT has value 101, expected 0 to 100"),
        ("x" * 65, 5, "expected the name of an application, 1 to 64 long"),
    ],
)
async def test_a_share_that_cannot_be(trial: JobStore, name: str, percent: float, message: str) -> None:
    with pytest.raises(ServeAppError, match=message):
        await trial.set_canary(name, percent, "wan")


@one_database
@pytest.mark.parametrize("retryable", [True, False])
async def test_a_job_that_a_canary_fails_is_made_by_the_stable_pipeline(trial: JobStore, retryable: bool) -> None:
    job = await begun(trial, THEIRS[0])
    if retryable:
        await trial.retry(job.id, 1, LOST, OPTIONS)
    else:
        await trial.fail(job.id, 1, BROKEN.code, BROKEN.message)
    again = await claim(trial)
    assert (again.id, again.pipeline, again.tried_on, again.failures) == (job.id, "wan", "next", 0)
    evidence = await trial.evidence()
    assert evidence is not None and evidence.outcomes == [True]
    await trial.complete(job.id, 2, DONE)
    assert (await get(trial, job.id)).status == "completed"
    evidence = await trial.evidence()
    assert evidence is not None and (evidence.outcomes, evidence.stable_ended) == ([True], 1)


@one_database
async def test_a_canary_is_not_blamed_for_others(trial: JobStore) -> None:
    jobs = [await begun(trial, owner) for owner in THEIRS[:4]]
    for job, code in zip(jobs, ("cancelled", "deadline_exceeded", "store_failed"), strict=False):
        await trial.fail(job.id, 1, code, "Not its fault.")
        assert (await get(trial, job.id)).status == "failed"
    # Nor for a loss of a host, at first.
    gone = JobFailed("worker_lost", "Gone.", retryable=True)
    for attempt in (1, 2):
        await trial.retry(jobs[3].id, attempt, gone, OPTIONS)
        assert (await claim(trial)).pipeline == "next"
    evidence = await trial.evidence()
    assert evidence is not None and evidence.outcomes == []
    await trial.retry(jobs[3].id, 3, gone, OPTIONS)
    assert (await claim(trial)).pipeline == "wan"


@one_database
async def test_a_job_that_the_stable_pipeline_fails_too_is_at_fault_itself(trial: JobStore) -> None:
    job = await begun(trial, THEIRS[0])
    await trial.fail(job.id, 1, BROKEN.code, BROKEN.message)
    await claim(trial)
    await trial.fail(job.id, 2, BROKEN.code, BROKEN.message)
    assert (await get(trial, job.id)).status == "failed"
    evidence = await trial.evidence()
    assert evidence is not None and (evidence.outcomes, evidence.stable_failed) == ([], 1)


async def test_failures_abort_a_canary_and_its_jobs_go_on_elsewhere(trial: JobStore) -> None:
    admin, _ = await trial.keys.create("on call", ("read", "admin"))
    await trial.keys.create("somebody", ("read",))
    jobs = [await begun(trial, owner) for owner in THEIRS[:4]]
    await trial.release(jobs[3].id, 1)  # waits, the third runs
    for job in jobs[:2]:
        await trial.fail(job.id, 1, BROKEN.code, BROKEN.message)
    found = await trial.judge(TRIAL)
    assert found is not None and (found[0], found[1].action) == ("next", "abort")
    row = await state(trial, "next")
    assert (row.state, row.percent) == ("aborted", 0) and row.reason is not None and "2 of 2 jobs" in row.reason
    assert not await trial.complete(jobs[2].id, 1, DONE), "its run is superseded"
    for _ in range(4):
        again = await claim(trial)
        assert (again.pipeline, again.attempt) == ("wan", 2)
        await trial.complete(again.id, 2, DONE)
    assert (await begun(trial, THEIRS[5])).pipeline == "wan"
    assert await trial.judge(TRIAL) is None
    async with trial.database.read() as session:
        events = await session.execute(select(Event.owner, Event.video_id).where(Event.type == "canary.aborted"))
        assert sorted((owner, name) for owner, name in events) == [("", "next"), (admin.id, "next")]


async def test_two_judges_abort_once(trial: JobStore, store_url: str) -> None:
    for job in [await begun(trial, owner) for owner in THEIRS[:2]]:
        await trial.fail(job.id, 1, BROKEN.code, BROKEN.message)
    other = JobStore(store_url)
    await other.start()
    verdicts = await asyncio.gather(*(one.judge(TRIAL) for one in (trial, other, trial, other)))
    assert sum(verdict is not None for verdict in verdicts) == 1
    await other.close()


@one_database
async def test_a_job_that_was_claimed_just_then_is_fetched(trial: JobStore) -> None:
    job = await begun(trial, THEIRS[0])
    await trial.abort("next", "Bad.")
    async with trial.database.write() as session:  # as by a claim that had read the shares before
        row = await session.get(Job, job.id)
        assert row is not None
        row.status, row.pipeline, row.attempt = "in_progress", "next", 2
    await trial.judge(TRIAL)
    again = await claim(trial)
    assert (again.id, again.pipeline, again.attempt) == (job.id, "wan", 3)


async def test_a_canary_that_never_begins_a_job_is_aborted(trial: JobStore, clock: MovableClock) -> None:
    job = await begun(trial, THEIRS[0])
    assert await trial.leave_canary(job.id, 1)
    assert not await trial.leave_canary(job.id, 1), "it is handed over once"
    assert (await claim(trial)).pipeline == "wan"
    assert (await begun(trial, THEIRS[1])).pipeline == "wan", "it is away"
    clock.advance(AWAY_S)
    assert (await begun(trial, THEIRS[2])).pipeline == "next"
    assert await trial.judge(TRIAL) is None
    clock.advance(60)
    found = await trial.judge(TRIAL)
    assert found is not None and found[1].reason == "It began no job within 60 s of being given one."


@one_database
async def test_a_canary_that_begins_a_job_has_started(trial: JobStore, clock: MovableClock) -> None:
    job = await begun(trial, THEIRS[0])
    assert (await state(trial, "next")).wanted_at is not None
    await trial.progress(job.id, 1, Progress("denoise", 0, 4))
    await trial.judge(TRIAL)
    assert (await state(trial, "next")).wanted_at is None
    # While it makes that one, another may wait inside it for longer.
    await begun(trial, THEIRS[1])
    assert (await state(trial, "next")).wanted_at is not None
    clock.advance(1000)
    assert await trial.judge(TRIAL) is None


@one_database
async def test_a_stable_pipeline_that_cannot_be_reached_keeps_its_jobs(trial: JobStore) -> None:
    job = await begun(trial, OURS[0])
    assert not await trial.leave_canary(job.id, 1)
    assert (await get(trial, job.id)).status == "in_progress"


async def completed(store: JobStore, pipeline: str, count: int, seconds: float) -> None:
    """Add jobs that a pipeline has completed."""
    async with store.database.write() as session:
        now = await store.database.clock(session)
        for _ in range(count):
            job_id, created_at = new_id()
            times = {"created_at": created_at, "started_at": now - seconds, "completed_at": now}
            fields = {"model": "wan", "params": PARAMS.model_dump(), "effective_deadline": now, "work": 2.0}
            session.add(Job(id=job_id, status="completed", attempt=1, pipeline=pipeline, **times, **fields))


@one_database
async def test_a_slow_canary_is_aborted(trial: JobStore) -> None:
    await completed(trial, "wan", 4, 10)
    await completed(trial, "next", 7, 30)
    assert await trial.judge(TRIAL) is None
    await completed(trial, "next", 1, 30)
    found = await trial.judge(TRIAL)
    assert found is not None and found[1].reason == "It takes 3.00 times the stable pipeline's seconds, over 8 jobs."


async def test_a_good_canary_is_promoted_if_that_is_wanted(trial: JobStore) -> None:
    await completed(trial, "wan", 35, 10)
    await completed(trial, "next", 35, 10)
    kept = await begun(trial, OURS[0])
    assert await trial.judge(TRIAL) is None
    said = (await state(trial, "next")).verdict
    assert said is not None and said.startswith("Good: 0 of 35 jobs failed")
    found = await trial.judge(TRIAL.model_copy(update={"auto_promote": True}))
    assert found is not None and found[1].action == "promote"
    assert [(row.name, row.state) for row in (await trial.rollout()).rows] == [("next", "stable"), ("wan", "retired")]
    assert (await begun(trial, OURS[1])).pipeline == "next"
    await trial.release(kept.id, 1)
    assert (await claim(trial)).pipeline == "wan", "for life"
    # The application is gone: what was left on it goes on with the new one.
    assert await trial.leave_canary(kept.id, 2)
    assert (await claim(trial)).pipeline == "next"
    await trial.promote("wan", "wan")
    assert (await begun(trial, THEIRS[1])).pipeline == "wan"


@pytest.mark.parametrize(("theirs", "resumes"), [("r1", True), ("r2", False)])
async def test_a_saved_state_goes_on_only_with_the_same_revision(trial: JobStore, theirs: str, resumes: bool) -> None:
    for owner, revision in ((OURS[0], "r1"), (THEIRS[0], theirs)):
        job = await begun(trial, owner)
        await trial.complete(job.id, 1, Done({}, {}, 1, revision=revision))
    job = await begun(trial, THEIRS[1])
    await trial.progress(job.id, 1, Progress("denoise", 3, 4, saved_step=2), 3)
    assert job.sample_prefix == f"samples/{job.id}"
    await trial.judge(TRIAL)
    await trial.abort("next", "Bad.")
    again = await claim(trial)
    assert (again.sample_prefix == job.sample_prefix) == resumes
    assert (again.resumed_step, again.saved_step) == ((3, 2) if resumes else (0, 0))
    assert again.sample_prefix.startswith(again.state_prefix), "the janitor finds both"


@one_database
async def test_jobs_from_before_the_first_canary_are_the_stable_pipelines(store: JobStore) -> None:
    job = await begun(store, THEIRS[0])
    await store.release(job.id, 1)
    await store.set_canary("next", 100, "wan")
    again = await claim(store)
    assert (again.pipeline, again.states) == ("wan", None)
    assert (await begun(store, THEIRS[0])).pipeline == "next"
