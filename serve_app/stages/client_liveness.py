"""Ends the work for callers that have died.

Ray does not tell a stream's producer when the consumer's process is killed (measured, Ray 2.60: it goes on to its end).
So the videos of a dispatcher that died would be denoised to their end, beside their own second attempts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import ActorDiedError, RayError

from serve_app.compat.ray import actor_id, actor_ready
from serve_app.logs import get_logger

logger = get_logger(__name__)

_PERIOD_S = 2.0
# An actor that does not answer for a moment is not dead: its host may be busy, or its link down.
_ANSWER_S = 30.0


class ClientLiveness:
    """Watches the processes that a replica works for."""

    def __init__(self) -> None:
        self._tasks: dict[str, set[asyncio.Task[Any]]] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}

    @contextmanager
    def watching(self, caller: Any) -> Iterator[None]:
        """Cancel the current task if its caller dies before the context ends.

        Args:
            caller: handle of its process, from `this_process`; None is not watched.
        """
        task = asyncio.current_task()
        if caller is None or task is None:
            yield
            return
        name = actor_id(caller)
        self._tasks.setdefault(name, set()).add(task)
        if name not in self._watchers:
            self._watchers[name] = asyncio.create_task(self._watch(name, caller), name=f"caller-{name}")
        try:
            yield
        finally:
            self._tasks[name].discard(task)
            if not self._tasks[name]:
                del self._tasks[name]
                self._watchers.pop(name).cancel()

    async def _watch(self, name: str, caller: Any) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            try:
                await asyncio.wait_for(actor_ready(caller), _ANSWER_S)
            except ActorDiedError:
                break
            except (RayError, TimeoutError):
                continue
        tasks = self._tasks.get(name, set())
        logger.warning("caller died", extra={"actor": name, "cancelled": len(tasks)})
        for task in tasks:
            task.cancel()
