"""Loops that a dispatcher's process starts, watches and ends: tasks of the event loop that run until stopped."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeAlias

NamedLoops: TypeAlias = Mapping[str, Callable[[], Coroutine[Any, Any, None]]]
"""Loops by their names, for errors and for whoever lists the tasks."""

# Seconds that a loop has to end in once it is cancelled.
_END_S = 5


class Loops(ABC):
    """One or several loops of one thing. A loop that ends by itself is found by `raise_if_ended`."""

    _tasks: tuple[asyncio.Task[None], ...] = ()
    _stopped = False

    @abstractmethod
    def _loops(self) -> NamedLoops:
        """Return the loops by name."""

    def start(self) -> None:
        """Begin, as tasks of the running event loop."""
        self._stopped = False
        self._tasks = tuple(asyncio.create_task(loop(), name=name) for name, loop in self._loops().items())

    async def stop(self) -> None:
        """End at once, wherever the loops are."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_END_S)

    def raise_if_ended(self) -> None:
        """Raise RuntimeError, with its cause, if a loop has ended without being told to."""
        for task in () if self._stopped else self._tasks:
            if task.done():
                raise RuntimeError(f"the loop '{task.get_name()}' has ended") from (
                    None if task.cancelled() else task.exception()
                )
