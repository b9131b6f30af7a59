"""The databases that tests run on: SQLite always, PostgreSQL where a server listens on its standard port."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serve_app.db.tables import Base
from serve_app.jobs.store import JobStore
from serve_app.wan.cost import video_tflop
from tests.support.shapes import A14B

SERVER = os.environ.get("WAN_TEST_POSTGRES", "postgresql://root@127.0.0.1:5432/test")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """Yield the URL of a database of this run's own, dropped afterwards."""
    try:
        import asyncpg

        async def run(statement: str) -> None:
            connection = await asyncpg.connect(SERVER, timeout=30)
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        name = f"wan_test_{secrets.token_hex(6)}"
        asyncio.run(run(f"CREATE DATABASE {name}"))
    except (ImportError, OSError, TimeoutError) as error:
        reason = f"PostgreSQL at {SERVER} cannot be used: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    yield f"{SERVER.rpartition('/')[0]}/{name}"
    asyncio.run(run(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the tables, to be copied: making them takes longer than most tests."""
    path = tmp_path_factory.mktemp("sqlite") / "jobs.db"

    async def make() -> None:
        store = JobStore(f"sqlite:///{path}", 0.2, work_of=partial(video_tflop, A14B))
        await store.start()
        await store.close()

    asyncio.run(make())
    return path


async def count_queued(store: JobStore) -> int:
    """Count the jobs that wait, of which there are less than a hundred."""
    jobs, more = await store.list(limit=100, status="queued")
    assert not more
    return len(jobs)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Yield a URL for each kind of database; see `store` for an empty one."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
async def empty_url(store_url: str) -> AsyncIterator[str]:
    """Yield a URL for each kind of database, without any tables."""
    yield await _emptied(store_url)
    await _emptied(store_url)


async def _emptied(url: str) -> str:
    if url.startswith("postgresql"):
        import asyncpg

        connection = await asyncpg.connect(url)
        await connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        await connection.close()
    return url


@pytest.fixture
async def store(store_url: str, empty_sqlite: Path, request: pytest.FixtureRequest) -> AsyncIterator[JobStore]:
    """Yield a started store without jobs."""
    kind, _, path = store_url.partition(":///")
    if kind == "sqlite":
        shutil.copy(empty_sqlite, path)
    # Files that a run stores after its end: at once in a folder, later in S3.
    late_outputs_s = 2 if request.config.getoption("--slow") else 0.2
    store = JobStore(store_url, late_outputs_s, work_of=partial(video_tflop, A14B))
    await store.start()
    async with store._db.write() as session:
        for table in Base.metadata.sorted_tables:
            await session.execute(table.delete())
    yield store
    await store.close()


def on_store(url: str, work: Callable[[JobStore], Awaitable[Any]]) -> Any:
    """Return what `work` returns on a store that is opened for it, in an event loop of its own."""

    async def main() -> Any:
        store = JobStore(url)
        await store.start()
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(main())
