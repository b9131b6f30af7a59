"""Reports of how many replicas of each deployment run, for estimates: the database is what all gateways can see.

Knows nothing of Ray: the counts come from a function.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from serve_app.clock import CLOCK, Clock
from serve_app.dispatch.loops import Loops, NamedLoops
from serve_app.errors import one_line
from serve_app.jobs.store import JobStore
from serve_app.logs import get_logger

logger = get_logger(__name__)

# Seconds between two reports: a report holds for half a minute (`serve_app.jobs.outlook.FLEET_S`).
_EVERY_S = 5.0

Counts = Callable[[], Awaitable[Mapping[str, int]]]
"""Returns the number of running replicas of each deployment."""


class FleetReporter(Loops):
    """Repeats the number of replicas of an application's deployments.

    Args:
        store: a started job store.
        application: its name.
        counts: looks at it.
        clock: the clock by which it waits.
    """

    def __init__(self, store: JobStore, application: str, counts: Counts, clock: Clock = CLOCK) -> None:
        self._store = store
        self._application = application
        self._counts = counts
        self._clock = clock

    def _loops(self) -> NamedLoops:
        return {"fleet": self._loop}

    async def _loop(self) -> None:
        while True:
            try:
                await self._store.report_replicas(self._application, await self._counts())
            except Exception as error:  # whatever it is: an old report is not believed, and estimates become unknown
                logger.warning("replicas not reported", extra={"error": one_line(error)})
            await self._clock.sleep(_EVERY_S)
