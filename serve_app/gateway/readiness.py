"""The state that `/readyz` shows: whether this process accepts jobs, and whether videos are made now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from serve_app.errors import Unavailable
from serve_app.gateway.http.errors import ApiError
from serve_app.gateway.schemas import ReadyState
from serve_app.gateway.videos.admission import Admission
from serve_app.jobs.store import JobStore

Ready = Callable[[], Awaitable[str | None]]
"""Returns None if videos can be made now, or else the reason why not. Raises Unavailable, with the reason, if as far as
is known no video ever could be made."""

# Seconds for which an answer holds, and for which one is waited for.
_HOLDS_S = 1.0
_WAIT_S = 5.0
_PAUSED = "An operator has paused the queue."


class Readiness:
    """The state of this process, looked up at most once a second.

    A process that accepts jobs is ready even while the pipeline is not: jobs wait in the queue. Otherwise a load
    balancer would turn everybody away for the seconds in which one rank is replaced.
    """

    def __init__(self, store: JobStore, admission: Admission, ready: Ready) -> None:
        self._store = store
        self._admission = admission
        self._ready = ready
        self._was_ready = False
        self._found: ReadyState | str = "Nothing is known yet."
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()

    async def state(self) -> ReadyState:
        """Return the state.

        Raises:
            ApiError: 503 if no job can be accepted, or no video could be made since the start.
        """
        async with self._looking:
            if time.monotonic() - self._looked_at >= _HOLDS_S:
                self._found = await self._look()
                self._looked_at = time.monotonic()
            found = self._found
        if isinstance(found, str):
            raise ApiError(503, "not_ready", found, retry=True)
        return found

    async def _look(self) -> ReadyState | str:
        """Return the state, or the reason why no job is accepted."""
        try:
            paused = await asyncio.wait_for(self._store.paused_since(), _WAIT_S) is not None
        except Exception as error:
            return f"The job store does not answer: {type(error).__name__}."
        try:
            await self._admission.check_open()
        except Unavailable as error:
            return str(error)
        try:
            reason = await asyncio.wait_for(self._ready(), _WAIT_S)
            self._was_ready = True
        except Unavailable as error:
            reason = str(error)
        except Exception as error:
            reason = f"The pipeline's state is unknown: {type(error).__name__}."
        if reason is None:
            return ReadyState(status="paused", reason=_PAUSED) if paused else ReadyState(status="ready")
        if not self._was_ready:
            return reason
        return ReadyState(status="degraded", reason=f"{reason} {_PAUSED}" if paused else reason)
