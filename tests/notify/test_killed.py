"""A notifier is killed between sending and recording: another sends the event again, with the same id."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from serve_app.jobs.store import JobStore
from serve_app.notify.endpoints import Endpoints
from tests.support.fakes import until
from tests.support.receiver import HANG, receiving
from tests.support.sending import Notify, completed, ended, listen

TIMEOUT_S = 1.0
NOTIFIER = """
import asyncio, sys
from serve_app.notify.notifier import Notifier
from serve_app.jobs.store import JobStore
from tests.support.sending import options

async def main(url, timeout_s):
    store = JobStore(url)
    await store.start()
    Notifier(store.database, options(timeout_s=float(timeout_s))).start()
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""
ROOT = Path(__file__).parents[2]


async def test_another_sends_it(store: JobStore, store_url: str, endpoints: Endpoints, notify: Notify) -> None:
    async with receiving() as receiver:
        receiver.answers = [HANG]
        await listen(endpoints, receiver)
        video_id = await completed(store)
        command = (sys.executable, "-c", NOTIFIER, store_url, str(TIMEOUT_S))
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
        try:

            async def asked() -> bool:
                return bool(receiver.requests)

            await until(asked, within_s=60)
        finally:
            process.send_signal(signal.SIGKILL)
        assert await process.wait() == -signal.SIGKILL
        notify(timeout_s=TIMEOUT_S)
        (row,) = await ended(store)
        assert (row.status, row.claims, len(row.log)) == ("delivered", 2, 1)
        first, second = receiver.requests
        assert first.body == second.body and video_id.encode() in first.body
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
