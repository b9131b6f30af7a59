from __future__ import annotations

import asyncio
import sys
from functools import partial
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from serve_app.db.schema import alembic_config
from serve_app.db.tables import Base
from serve_app.errors import ConfigError
from serve_app.events import Done
from serve_app.jobs.store import JobStore
from serve_app.request import Urgency
from serve_app.wan.cost import video_tflop
from tests.support.databases import count_queued
from tests.support.fakes import PARAMS
from tests.support.shapes import A14B

ROOT = Path(__file__).parents[2]


async def execute(store: JobStore, *statements: str) -> None:
    async with store._db.write() as session:
        for statement in statements:
            await session.execute(text(statement))


async def migrate_back(store: JobStore, revision: str) -> None:
    """Leave a store's tables as they were at a revision."""
    async with store._db.write() as session:
        connection = await session.connection()
        await connection.run_sync(lambda one: command.downgrade(alembic_config(one), revision))


async def test_the_revisions_make_the_tables_that_the_code_declares(store: JobStore) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), Base.metadata))

    async with store._db.read() as session:
        assert await (await session.connection()).run_sync(differences) == []


async def test_a_difference_would_be_seen(store: JobStore) -> None:
    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), Base.metadata))

    try:
        await execute(store, "DROP INDEX jobs_by_expiry")
        async with store._db.read() as session:
            (found,) = await (await session.connection()).run_sync(differences)
        assert found[0] == "add_index"
    finally:
        await execute(store, "CREATE INDEX jobs_by_expiry ON jobs (expires_at)")


async def test_a_newer_schema_is_refused(empty_url: str) -> None:
    store = JobStore(empty_url)
    await store.start()
    await execute(store, "UPDATE alembic_version SET version_num = '9999'")
    await store.close()
    with pytest.raises(ConfigError, match=r"^store\.url has value '.*revision '9999', which this version .*newer"):
        await JobStore(empty_url).start()


async def test_tables_without_a_revision_are_refused(empty_url: str) -> None:
    store = JobStore(empty_url)
    await store.start()
    await execute(store, "DROP TABLE alembic_version")
    await store.close()
    with pytest.raises(ConfigError, match=r"^store\.url has value '[^\n]*: its tables have no revision, expected an "):
        await JobStore(empty_url).start()


async def test_an_older_schema_is_brought_up_to_date(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is as an older version would leave it, before the first revision."""
    store = JobStore(empty_url)
    await store.start()
    tables = ", ".join(table.name for table in reversed(Base.metadata.sorted_tables))
    drop = [f"DROP TABLE {name}" for name in tables.split(", ")]
    await execute(store, *drop, "DELETE FROM alembic_version")
    await store.close()
    again = JobStore(empty_url)
    await again.start()
    job = await again.create(PARAMS, "wan")
    assert await again.get(job.id) is not None
    await again.close()


async def test_work_in_pixels_is_forgotten(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate that took pixels for TFLOP would be off by orders of magnitude."""
    monkeypatch.setattr("serve_app.jobs.outlook._PACE_S", 0)

    async def complete(store: JobStore) -> None:
        job = await store.claim("me", 60)
        assert job is not None and await store.complete(job.id, 1, Done({}, {}, 1))

    store = JobStore(empty_url)
    await store.start()
    old = [await store.create(PARAMS, "wan") for _ in range(3)]
    await complete(store)
    await migrate_back(store, "0002")
    await execute(store, "UPDATE jobs SET work = 294912", "UPDATE alembic_version SET version_num = '0001'")
    await store.close()

    store = JobStore(empty_url, work_of=partial(video_tflop, A14B))
    await store.start()
    for job in old:
        found = await store.get(job.id)
        assert found is not None and found.work is None and found.params == PARAMS.model_dump()
    assert await store.seconds_left(old[2]) is None
    new = await store.create(PARAMS, "wan", Urgency(priority="interactive"))
    await complete(store)
    await execute(store, f"UPDATE jobs SET started_at = 100, completed_at = 110 WHERE id = '{new.id}'")
    assert await store.seconds_left(old[1]) == pytest.approx(10)
    assert await store.seconds_left(old[2]) == pytest.approx(20, abs=1)
    await store.close()


STARTER = """
import asyncio, sys
from serve_app.jobs.store import JobStore
from tests.support.fakes import PARAMS

async def main(url):
    store = JobStore(url)
    print("ready", flush=True)
    sys.stdin.readline()
    await store.start()
    await store.create(PARAMS, "wan")
    await store.close()

asyncio.run(main(sys.argv[1]))
"""


async def test_processes_that_start_at_once_do_not_clash(empty_url: str) -> None:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-c", STARTER, empty_url)
    processes = [
        await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    said = await asyncio.gather(*(process.communicate(b"\n") for process in processes))
    assert [process.returncode for process in processes] == [0, 0, 0], said
    store = JobStore(empty_url)
    await store.start()
    assert await count_queued(store) == 3
    await store.close()
