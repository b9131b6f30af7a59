"""Saves samples to storage while steps go on, and finds the latest saved state.

Knows nothing of samples: it is given a function that returns the bytes.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from serve_app.errors import one_line
from serve_app.logs import get_logger
from serve_app.storage import Storage

logger = get_logger(__name__)

_KEY = re.compile(r".*/(\d+)-[0-9a-f]+\.safetensors")


def _step(key: str) -> int:
    match = _KEY.fullmatch(key)
    return int(match[1]) if match else -1


async def latest_state(storage: Storage, prefix: str) -> bytes | None:
    """Return the furthest state that was saved under `prefix`; None if there is none."""
    for key in sorted(await storage.list(prefix), key=_step, reverse=True):
        if _step(key) >= 0:
            try:
                return await storage.get(key)
            except FileNotFoundError:  # replaced meanwhile
                continue
    return None


class Saver:
    """Writes states in a thread of its own, one after the other.

    A state is a new object `<prefix>/<step>-<random>.safetensors`. States of earlier steps are removed once it is
    there, so that at any moment at least one is complete.

    Args:
        storage: where they go.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._lock = threading.Lock()
        self._busy: set[str] = set()

    def save(self, prefix: str, step: int, state: Callable[[], bytes]) -> None:
        """Save a state, and return at once.

        A state is left out if the last one of the same prefix is still being written: a slow storage must not fill the
        memory.

        Args:
            prefix: storage folder of the sample's states.
            step: steps that the sample has behind it.
            state: returns the bytes; called in the thread.
        """
        with self._lock:
            if prefix in self._busy:
                logger.warning("state not saved, the last one is still being written", extra={"prefix": prefix})
                return
            self._busy.add(prefix)
        self._thread.submit(self._write, prefix, step, state)

    def _write(self, prefix: str, step: int, state: Callable[[], bytes]) -> None:
        try:
            asyncio.run(self._put(prefix, step, state()))
        except Exception as error:  # the job goes on: it only has more steps to repeat if its group is lost
            logger.warning("state not saved", extra={"prefix": prefix, "step": step, "error": one_line(error)})
        finally:
            with self._lock:
                self._busy.discard(prefix)

    async def _put(self, prefix: str, step: int, data: bytes) -> None:
        key = f"{prefix}/{step:05d}-{secrets.token_hex(4)}.safetensors"
        await self._storage.put(key, data)
        for older in await self._storage.list(prefix):
            if older != key and _step(older) <= step:
                await self._storage.delete(older)
