"""Dispatchers that drive two pipelines, and two generations of dispatchers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import select

from serve_app.config import CanaryConfig
from serve_app.db.rollouts import Shadow
from serve_app.dispatch.dispatcher import Dispatcher
from serve_app.dispatch.generation import Gate
from serve_app.dispatch.judge import Judge
from serve_app.dispatch.pipelines import Pipelines
from serve_app.dispatch.run import PipelineUnavailable
from serve_app.dispatch.shadowing import Shadowing
from serve_app.events import Done, Event
from serve_app.job_spec import JobSpec
from serve_app.jobs.assignment import share
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from tests.support.clock import MovableClock
from tests.support.fakes import PARAMS, FakePipeline, files, until
from tests.support.running import OPTIONS, ended

# What this file tests of the databases is in tests/jobs/test_rollouts.py.
pytestmark = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)

THEIRS = [owner for owner in map(str, range(100)) if share("next", owner) < 50]
Serve = Callable[..., Dispatcher]


class Revised(FakePipeline):
    """A pipeline that says its revision, and may store other bytes."""

    def __init__(self, storage: Storage, revision: str = "r1", tail: bytes = b"", **options: Any) -> None:
        super().__init__(storage, **options)
        self.revision = revision
        self.tail = tail

    async def __call__(self, job: JobSpec) -> AsyncGenerator[Event, None]:
        async for event in super().__call__(job):
            if isinstance(event, Done):
                if self.tail:
                    await self.storage.delete(event.outputs["video"])
                    await self.storage.put(event.outputs["video"], self.tail)
                event = Done(event.outputs, event.timings, event.size_bytes, revision=self.revision)
            yield event


async def unreachable(job: JobSpec) -> AsyncGenerator[Event, None]:
    raise PipelineUnavailable("application 'next' is not deployed")
    yield


@pytest.fixture
async def serve(store: JobStore, storage: Storage, clock: MovableClock) -> AsyncIterator[Serve]:
    """Start a dispatcher with a judge, over pipelines by name."""
    started: list[Any] = []

    def begin(pipelines: dict[str, Any], generation: str = "", drain_s: float = 1000, **canary: Any) -> Dispatcher:
        trial = CanaryConfig(**{"bake_s": 0, "start_within_s": 60, **canary})
        options = OPTIONS.model_copy(update={"canary": trial})
        runner = Pipelines("wan", pipelines.__getitem__)
        gate = Gate(store, generation, drain_s, clock=clock)
        dispatcher = Dispatcher(store, storage, runner, options, clock=clock, gate=gate)
        parts: list[Any] = [dispatcher, Judge(store, options, clock), Shadowing(store, storage, runner, options, clock)]
        for part in parts:
            part.start()
        started.extend(parts)
        return dispatcher

    yield begin
    for part in reversed(started):
        await part.stop()


async def create(store: JobStore, owner: str = "") -> str:
    return (await store.create(PARAMS, "wan", owner=owner)).id


async def test_a_canary_that_fails_is_rolled_back_and_its_jobs_are_made(
    store: JobStore, storage: Storage, serve: Serve
) -> None:
    await store.set_canary("next", 50, "wan")
    wan, following = FakePipeline(storage), FakePipeline(storage, errors=[ZeroDivisionError("x")] * 99)
    serve({"wan": wan, "next": following})
    jobs = [await create(store, owner) for owner in THEIRS[:12]]
    for job in jobs:
        row = await ended(store, job, "completed")
        assert row.pipeline == "wan"
    canary = (await store.rollout()).find("next")
    assert canary is not None and canary.state == "aborted"
    assert {job.id for job in wan.jobs} == set(jobs)


async def test_a_canary_that_is_not_deployed_holds_nobody_up(
    store: JobStore, storage: Storage, serve: Serve, clock: MovableClock
) -> None:
    await store.set_canary("next", 100, "wan")
    wan = FakePipeline(storage)
    serve({"wan": wan, "next": unreachable})
    jobs = [await create(store) for _ in range(3)]
    for job in jobs:
        assert (await ended(store, job, "completed")).tried_on is None
    clock.advance(61)

    async def aborted() -> bool:
        row = (await store.rollout()).find("next")
        return row is not None and row.state == "aborted"

    await until(aborted)


async def test_runs_of_an_aborted_canary_end(store: JobStore, storage: Storage, serve: Serve) -> None:
    await store.set_canary("next", 100, "wan")
    following = FakePipeline(storage, gate=asyncio.Event())
    dispatcher = serve({"wan": FakePipeline(storage), "next": following})
    job = await create(store)

    async def runs() -> bool:
        return bool(following.jobs)

    await until(runs)
    await store.abort("next", "Slow.")
    row = await ended(store, job, "completed")
    assert (row.pipeline, row.attempt, following.ended) == ("wan", 2, [job])

    async def idle() -> bool:
        return dispatcher.running == 0

    await until(idle)


@pytest.mark.parametrize(
    ("following", "outcome", "state"),
    [
        ({}, "equal", "canary"),
        ({"tail": b"other"}, "different", "aborted"),
        ({"tail": b"other", "revision": "r2"}, "other_revision", "canary"),
        ({"errors": [ZeroDivisionError("x")]}, "failed", "canary"),
    ],
)
async def test_shadows_are_compared_and_leave_nothing(
    store: JobStore, storage: Storage, serve: Serve, following: dict[str, Any], outcome: str, state: str
) -> None:
    await store.set_canary("next", 0, "wan")
    copier = Revised(storage, **following)
    serve({"wan": Revised(storage), "next": copier}, shadow=True)
    job = await create(store)
    await ended(store, job, "completed")

    async def copied() -> Shadow | None:
        async with store.database.read() as session:
            row = await session.scalar(select(Shadow))
        return row if row is not None and row.outcome != "running" else None

    assert (await until(copied)).outcome == outcome

    async def settled() -> bool:
        row = (await store.rollout()).find("next")
        gone = not any(file.startswith("shadow") for file in files(storage))
        return row is not None and row.state == state and gone

    await until(settled)
    assert await store.counts() == {"completed": 1}
    (spec,) = copier.jobs
    assert (spec.priority, spec.state_prefix, spec.prefix) == ("batch", None, f"shadow/{job}")
    assert spec.params == PARAMS


async def test_a_new_generation_takes_over_and_the_old_one_ends_its_jobs(
    store: JobStore, storage: Storage, serve: Serve
) -> None:
    old, new = FakePipeline(storage, gate=asyncio.Event()), FakePipeline(storage)
    serve({"wan": old}, "old")
    first = await create(store)

    async def runs() -> bool:
        return len(old.jobs) == 1

    await until(runs)
    serve({"wan": new}, "new")
    assert old.gate is not None

    async def taken_over() -> bool:
        return (await store.generations())[0][0].name == "new"

    await until(taken_over)
    second = await create(store)
    await ended(store, second, "completed")
    old.gate.set()
    await ended(store, first, "completed")
    assert [job.id for job in old.jobs] == [first] and [job.id for job in new.jobs] == [second]


async def test_jobs_that_take_too_long_go_on_in_the_new_generation(
    store: JobStore, storage: Storage, serve: Serve
) -> None:
    old, new = FakePipeline(storage, gate=asyncio.Event(), saving=True), FakePipeline(storage, saving=True)
    serve({"wan": old}, "old", drain_s=0)
    job = await create(store)

    async def runs() -> bool:
        return len(old.jobs) == 1

    await until(runs)
    serve({"wan": new}, "new")

    row = await ended(store, job, "completed")
    assert row.attempt == 2 and row.failures == row.interruptions == 0
