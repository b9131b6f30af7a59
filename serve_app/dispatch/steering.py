"""The loop in which a dispatcher looks at the queue and steers how much is offered."""

from __future__ import annotations

from serve_app.clock import CLOCK, Clock
from serve_app.dispatch.loops import Loops, NamedLoops
from serve_app.errors import one_line
from serve_app.jobs.degrading import Steering
from serve_app.jobs.store import JobStore
from serve_app.logs import get_logger

logger = get_logger(__name__)

_EVERY_S = 5.0


class DegradeLoop(Loops):
    """Steers the level again and again. Any number of dispatchers may do it on one store.

    Args:
        store: a started job store.
        options: when to offer less.
        clock: the clock by which it waits.
    """

    def __init__(self, store: JobStore, options: Steering, clock: Clock = CLOCK) -> None:
        self._store = store
        self._options = options
        self._clock = clock

    def _loops(self) -> NamedLoops:
        return {"degrade": self._loop}

    async def _loop(self) -> None:
        told = 0
        while True:
            try:
                level = await self._store.steer(self._options)
                if level != told:
                    logger.warning("degrade level", extra={"level": level, "before": told})
                    told = level
            except Exception as error:  # the level stays as it is, and the next look may succeed
                logger.warning("degrade level not steered", extra={"error": one_line(error)})
            await self._clock.sleep(_EVERY_S)
