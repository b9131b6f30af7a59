from __future__ import annotations

import asyncio
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select, update

from serve_app.db.tables import Garbage, Job, id_time, new_id
from serve_app.errors import ConfigError
from serve_app.events import Progress
from serve_app.jobs.store import JobStore, QueueFull
from tests.support.claiming import DONE, LOST, OPTIONS, claim, create, get, nothing_to_claim
from tests.support.clock import MovableClock
from tests.support.databases import count_queued
from tests.support.fakes import PARAMS


def test_ids() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len({video_id for video_id, _ in ids}) == 1000
    for video_id, created_at in ids:
        assert id_time(video_id) == created_at
    for wrong in ("", "video_", "video_x", ids[0][0] + "0", ids[0][0].upper(), "video_\0", ids[0][0] + "\n"):
        assert id_time(wrong) is None


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://", "sqlite:///:memory:", "nonsense"])
def test_urls_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"store\.url has value"):
        JobStore(url)


async def test_password_is_not_shown() -> None:
    with pytest.raises(ConfigError) as error:
        JobStore("mysql://user:secret@host/db")
    assert "secret" not in str(error.value)


async def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database, but long enough to be read as the header of one " * 9)
    for url in (
        f"sqlite:///{tmp_path / 'file'}",
        f"sqlite:///{tmp_path / 'file' / 'jobs.db'}",
        "postgresql://u:secret@127.0.0.1:1/x",
    ):
        with pytest.raises(ConfigError, match=r"^store\.url has value '.*': cannot be opened: [^\n]+$") as error:
            await JobStore(url).start()
        assert "secret" not in str(error.value)


async def test_a_driver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(ConfigError, match="needs the package 'asyncpg'"):
        await JobStore("postgresql://127.0.0.1/x").start()


async def test_start_twice_and_survives_reopening(store: JobStore, store_url: str) -> None:
    job = await create(store)
    await store.start()
    other = JobStore(store_url)
    await other.start()
    assert (await get(other, job.id)).params == PARAMS.model_dump() | {"prompt": "a cat"}
    await other.close()
    with pytest.raises(RuntimeError, match="not started"):
        await other.get(job.id)


async def test_starting_at_the_same_time(tmp_path: Path) -> None:
    stores = [JobStore(f"sqlite:///{tmp_path / 'deep' / 'jobs.db'}") for _ in range(5)]
    await asyncio.gather(*(store.start() for store in stores))
    await create(stores[0])
    assert await count_queued(stores[4]) == 1
    await asyncio.gather(*(store.close() for store in stores))


async def test_a_new_file_that_another_writes_is_waited_for(tmp_path: Path) -> None:
    """Switching it to a write-ahead log needs it alone, and SQLite itself does not wait for that."""
    with closing(sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
        starting = asyncio.create_task(store.start())
        await asyncio.sleep(0.5)
        assert not starting.done()
        other.execute("COMMIT")
        await starting
        await create(store)
        await store.close()


async def test_life_of_a_job(store: JobStore) -> None:
    job = await create(store, "一只猫 🐈")
    assert (job.status, job.attempt, job.progress, job.outputs, job.warnings) == ("queued", 0, 0, {}, [])
    assert await count_queued(store) == 1
    claimed = await claim(store)
    assert (claimed.id, claimed.status, claimed.attempt, claimed.lease_owner) == (job.id, "in_progress", 1, "me")
    assert claimed.started_at is not None and claimed.lease_until is not None
    assert 59 < claimed.lease_until - claimed.started_at < 61
    assert claimed.prefix == f"videos/{job.id}/1"
    assert await nothing_to_claim(store)
    assert await store.progress(job.id, 1, Progress("denoise", 2, 4, 3.5))
    running = await get(store, job.id)
    assert (running.stage, running.step, running.steps, running.progress) == ("denoise", 2, 4, 47)
    assert running.seconds_left == 3.5
    assert await store.complete(job.id, 1, DONE)
    done = await get(store, job.id)
    assert (done.status, done.progress, done.finished) == ("completed", 100, True)
    assert (done.outputs, done.timings, done.size_bytes, done.warnings) == (
        DONE.outputs,
        DONE.timings,
        DONE.size_bytes,
        DONE.warnings,
    )
    assert done.completed_at is not None and done.lease_owner is None and done.seconds_left is None
    assert done.params["prompt"] == "一只猫 🐈"


async def test_cancel(store: JobStore) -> None:
    waiting, running = await create(store), await create(store)
    cancelled = await store.request_cancel(waiting.id)
    assert cancelled is not None
    assert (cancelled.status, cancelled.error_code) == ("failed", "cancelled")
    assert (await claim(store)).id == running.id
    asked = await store.request_cancel(running.id)
    assert asked is not None
    assert (asked.status, asked.cancel_requested) == ("in_progress", True)
    assert await store.still_held({running.id: 1}) == {running.id: True}
    assert await store.renew({running.id: 1}, 60) == {running.id: True}
    # Whichever way the attempt ends, no other is made.
    assert await store.release(running.id, 1)
    assert (await get(store, running.id)).error_code == "cancelled"
    assert await store.request_cancel("video_nonsense") is None


async def test_delete(store: JobStore, clock: MovableClock) -> None:
    waiting, running = await create(store), await create(store)
    assert await store.delete(waiting.id)
    assert not await store.delete(waiting.id)
    assert not await store.delete("video_nonsense")
    assert (await claim(store)).id == running.id
    assert await store.delete(running.id)
    assert not await store.progress(running.id, 1, Progress("denoise", 1, 4))
    assert await store.still_held({running.id: 1}) == {}
    # The run may still store files for `late_outputs_s`, so its folders are removed now and once more after that.
    async with store._db.read() as session:
        rows = list((await session.execute(select(Garbage.prefix, Garbage.due_at).order_by(Garbage.due_at))).all())
    moments = {prefix: [at for other, at in rows if other == prefix] for prefix, _ in rows}
    assert len(moments.pop(f"videos/{waiting.id}")) == 1
    assert set(moments) == {f"samples/{running.id}", f"videos/{running.id}"}
    for now, later in moments.values():
        assert later - now == pytest.approx(store._late_outputs_s)
    clock.advance(store._late_outputs_s)
    assert len(await due(store)) == len(rows)


async def due(store: JobStore) -> list[str]:
    return sorted(item.prefix for item in await store.garbage())


async def test_files_of_earlier_attempts_are_garbage(store: JobStore) -> None:
    job = await create(store)
    await claim(store, lease_s=-1)
    await claim(store)
    await store.complete(job.id, 2, DONE)
    assert await due(store) == [f"samples/{job.id}", f"videos/{job.id}/1"]


@pytest.mark.parametrize("end", ["complete", "fail", "cancel waiting", "cancel running", "give up", "deadline"])
async def test_saved_states_go_when_the_job_has_ended_for_good(store: JobStore, clock: MovableClock, end: str) -> None:
    job = await store.create(PARAMS, "wan")
    for attempt in (1, 2):
        await claim(store)
        if attempt == 1 or end in ("cancel waiting", "deadline"):
            await store.retry(job.id, attempt, LOST, OPTIONS)
            assert await store.garbage() == []  # the next attempt continues from them
    if end == "complete":
        await store.complete(job.id, 2, DONE)
    elif end == "fail":
        await store.fail(job.id, 2, "x", "y")
    elif end.startswith("cancel"):
        await store.request_cancel(job.id)
        await store.release(job.id, 2)
    elif end == "give up":
        await store.retry(job.id, 2, LOST, OPTIONS.model_copy(update={"max_attempts": 2}))
    else:
        async with store._db.write() as session:  # a deadline that has passed, however slow the machine is
            await session.execute(update(Job).where(Job.id == job.id).values(deadline_at=1.0))
        await store.sweep(OPTIONS)
    assert (await get(store, job.id)).finished
    for wait_s in (0, store._late_outputs_s):  # now, and when nobody can still be storing
        clock.advance(wait_s)
        (first, *_) = [item for item in await store.garbage() if item.prefix == f"samples/{job.id}"]
        await store.forget_garbage([first])
    clock.advance(store._late_outputs_s)
    await store.forget_garbage(await store.garbage())
    await store.delete(job.id)
    assert await due(store) == [f"videos/{job.id}"]


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_list_pages(store: JobStore, order: str) -> None:
    ids = [(await create(store, str(index))).id for index in range(7)]
    expected = ids if order == "asc" else ids[::-1]
    seen: list[str] = []
    after, more = None, True
    while more:
        jobs, more = await store.list(after, 3, order)  # type: ignore[arg-type]
        seen += [job.id for job in jobs]
        after = seen[-1]
        await store.delete(after)  # a page may start after a video that is gone
    assert seen == expected
    with pytest.raises(LookupError):
        await store.list("nonsense")


async def test_list_and_claim_use_indexes(tmp_path: Path) -> None:
    import sqlite3

    from sqlalchemy import select
    from sqlalchemy.dialects import sqlite

    from serve_app.jobs.order import due, next_job

    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    await store.start()
    await store.close()
    with sqlite3.connect(tmp_path / "jobs.db") as connection:
        for query in (
            "SELECT * FROM jobs WHERE (created_at, id) < (1.0, 'x') ORDER BY created_at DESC, id DESC LIMIT 3",
            str(select(Job.id).where(due(1)).limit(1).compile(compile_kwargs={"literal_binds": True})),
            str(next_job(1).compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})),
            "SELECT count(*) FROM jobs WHERE status = 'queued' AND owner = 'x' AND (turn, id) < (1.0, 'x')",
            "SELECT count(*) FROM jobs WHERE status = 'queued' AND (owner < 'x' OR owner > 'x') GROUP BY owner",
            "SELECT id FROM jobs WHERE status = 'queued' AND announced_at <= 1 AND not_before <= 1"
            " ORDER BY announced_at LIMIT 100",
            "SELECT id FROM jobs WHERE expires_at <= 1 ORDER BY expires_at LIMIT 100",
            "SELECT * FROM jobs WHERE status = 'in_progress' AND lease_until < 1 LIMIT 100",
            "SELECT * FROM jobs WHERE status = 'queued' AND deadline_at <= 1 LIMIT 100",
        ):
            plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}"))
            assert "SCAN jobs" not in plan and plan.count("TEMP B-TREE") == (query.count("heads") > 0), plan
    connection.close()


async def test_queue_bound(store: JobStore) -> None:
    for _ in range(2):
        await store.create(PARAMS, "wan", max_queued=2)
    with pytest.raises(QueueFull, match="2 jobs wait"):
        await store.create(PARAMS, "wan", max_queued=2)
    await claim(store)
    await store.create(PARAMS, "wan", max_queued=2)
