"""The judge, which watches the trial of a canary and ends it when the verdict is clear.

Knows nothing of Ray. Any number of judges share one store.
"""

from __future__ import annotations

from serve_app import config
from serve_app.clock import CLOCK, Clock
from serve_app.db.database import STORE_AWAY
from serve_app.dispatch.loops import Loops, NamedLoops
from serve_app.errors import one_line
from serve_app.jobs.store import JobStore
from serve_app.logs import get_logger
from serve_app.metrics import catalog as metrics

logger = get_logger(__name__)


class Judge(Loops):
    """A loop that looks at the store until stopped.

    Args:
        store: a started job store.
        options: how a canary is judged, and the seconds between two looks.
        clock: the clock by which it waits.
    """

    def __init__(self, store: JobStore, options: config.DispatcherConfig, clock: Clock = CLOCK) -> None:
        self._store = store
        self._options = options
        self._clock = clock

    def _loops(self) -> NamedLoops:
        return {"judge": self._loop}

    async def _loop(self) -> None:
        seeded = False
        while True:
            try:
                if not seeded:
                    await self._store.seed(self._options.pipeline, self._options.pipelines)
                    seeded = True
                if (ended := await self._store.judge(self._options.canary)) is not None:
                    name, verdict = ended
                    event = "canary aborted" if verdict.action == "abort" else "canary promoted"
                    metrics.canaries_ended.inc(end="aborted" if verdict.action == "abort" else "promoted")
                    logger.warning(event, extra={"pipeline": name, "reason": verdict.reason})
            except STORE_AWAY as error:
                logger.warning("canary not judged", extra={"error": one_line(error)})
            await self._clock.sleep(self._options.poll_s)
