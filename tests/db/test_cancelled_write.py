"""Whoever is cancelled within a write must not keep SQLite's one write lock."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from serve_app.events import Progress
from serve_app.jobs.store import JobStore
from tests.support.fakes import PARAMS


async def test_the_write_lock_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.db.database._BUSY_S", 2)
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    await store.start()
    video_id = (await store.create(PARAMS, "wan")).id
    await store.claim("me", 60)
    draw = random.Random(1)

    async def read() -> None:
        while True:
            await store.get(video_id)

    cancelled = []  # their tracebacks refer to cursors that were not read to the end
    for _ in range(60):
        write = asyncio.create_task(store.progress(video_id, 1, Progress("denoise", 1, 4)))
        reads = [asyncio.create_task(read()) for _ in range(2)]
        await asyncio.sleep(draw.uniform(0, 0.01))
        for task in (write, *reads):
            task.cancel()
        await asyncio.wait([write, *reads])
        cancelled.append(write)
        # Fails as "database is locked" where the lock is kept.
        assert await store.progress(video_id, 1, Progress("denoise", 2, 4))
    assert any(task.cancelled() for task in cancelled)
    await store.close()
