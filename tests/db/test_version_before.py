"""The version before runs on, and starts again on, the tables of this one: upgrades expand first and contract later."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from sqlalchemy import text

from serve_app.errors import ConfigError
from serve_app.jobs.store import JobStore
from tests.support.fakes import PARAMS

ROOT = Path(__file__).parents[2]

# Runs on the code of the version before.
OLD = """
import asyncio, sys
from serve_app.config import DispatcherConfig
from serve_app.errors import JobFailed
from serve_app.events import Done, Progress
from serve_app.jobs.store import JobStore
from serve_app.request import Params

async def main(url, params):
    store = JobStore(url)
    await store.start()
    first, second = [await store.create(Params.model_validate_json(params), "wan") for _ in range(2)]
    print("ready", flush=True)
    sys.stdin.readline()
    third = await store.create(Params.model_validate_json(params), "wan")
    await store.sweep(DispatcherConfig())
    for number, job in enumerate([await store.claim("old", 60) for _ in range(3)]):
        await store.progress(job.id, job.attempt, Progress("denoise", 1, 4))
        if number == 0:
            await store.complete(job.id, job.attempt, Done({}, {}, 1))
        elif number == 1:
            await store.retry(job.id, job.attempt, JobFailed("group_lost", "x", True, 1), DispatcherConfig())
        else:
            await store.release(job.id, job.attempt)
    await store.close()
    print("done", flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True).stdout


def _before_the_newest_revision() -> str:
    """Return the latest commit that has all revisions of the tables but the newest."""
    folder = "serve_app/db/migrations/versions"
    wanted = sorted(path.name for path in (ROOT / folder).glob("0*.py"))[:-1]
    for commit in git("log", "--format=%H", "--", folder).decode().split():
        there = git("ls-tree", "--name-only", commit, f"{folder}/").decode().split()
        if sorted(name for path in there if (name := Path(path).name).startswith("0")) == wanted:
            return commit
    raise LookupError("no commit has all revisions but the newest")


@pytest.fixture(scope="module")
def version_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of the latest release, or of the commit before the newest revision of the tables came."""
    try:
        tags = git("tag", "--list", "v*", "--sort=-v:refname", "--merged").decode().split()
        before = tags[0] if tags else _before_the_newest_revision()
        archive = git("archive", before, "serve_app")
    except (OSError, LookupError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the history is not here: {error}")
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
async def test_the_version_before_goes_on(empty_url: str, version_before: Path) -> None:
    pipe = asyncio.subprocess.PIPE
    old = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OLD, empty_url, PARAMS.model_dump_json()),
        env={**os.environ, "PYTHONPATH": str(version_before)},
        cwd=version_before,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
    )
    assert old.stdout is not None
    ready = await old.stdout.readline()
    assert ready == b"ready\n", (await old.communicate())[1].decode()
    store = JobStore(empty_url)
    await store.start()
    said, errors = await old.communicate(b"\n")
    assert said == b"done\n", errors.decode()
    assert await store.counts() == {"completed": 1, "queued": 2}
    for _ in range(2):
        job = await store.claim("new", 60)
        assert job is not None and job.attempt == 2
    await store.close()


@pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
async def test_a_newer_version_says_whether_this_one_may_start(empty_url: str) -> None:
    store = JobStore(empty_url)
    await store.start()
    async with store.database.write() as session:
        head = await session.scalar(text("SELECT version_num FROM alembic_version"))
        promised = await session.scalars(text("SELECT revision FROM compatible_revisions ORDER BY revision"))
        assert "0002" in (revisions := promised.all()) and "0001" not in revisions, "0002 dropped a column"
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await store.close()
    with pytest.raises(ConfigError, match="a newer version made them"):
        await JobStore(empty_url).start()
    store = JobStore(empty_url)
    async with _raw(empty_url) as connection:
        await connection.execute(text(f"INSERT INTO compatible_revisions VALUES ('9999', '{head}')"))
    await store.start()
    await store.create(PARAMS, "wan")
    await store.close()


def _raw(url: str):
    from sqlalchemy.ext.asyncio import create_async_engine

    return create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:")).begin()
