"""A video's changes as Server-Sent Events.

Each event is the whole resource, named by its status, and its id is a digest of it. So nothing has to be kept to
resume: who comes back with a `Last-Event-ID` gets the next state that differs from what it saw, and 204 where that was
the end, at which browsers stop asking.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator

from serve_app.errors import InvalidRequest, JobFailed
from serve_app.gateway.http.errors import ApiError
from serve_app.gateway.videos.schemas import Video, VideoDeleted
from serve_app.logs import get_logger

logger = get_logger(__name__)

# A comment this often, in seconds, keeps proxies from taking a quiet stream for a dead one.
KEEP_ALIVE_S = 15.0
_RECONNECT_MS = 2000


def event_id(data: str) -> str:
    """The name of a state."""
    return hashlib.sha256(data.encode()).hexdigest()[:16]


def is_end(video: Video, last_id: str | None) -> bool:
    """Whether the client has seen all that there will be."""
    return video.status in ("completed", "failed") and last_id == event_id(video.model_dump_json())


class Streams:
    """The streams of one process.

    Args:
        most: streams at once. Each takes up a request of those that Serve lets a replica have, for minutes or hours.

    Attributes:
        open: how many there are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.open = 0

    def check(self) -> None:
        """Raises ApiError if there are as many as may be."""
        if self.open >= self._most:
            message = f"{self.open} clients follow videos here already; ask for the video's state instead."
            raise ApiError(503, "too_many_streams", message, retry=True, retry_after="5")

    async def stream(
        self, video_id: str, changes: AsyncGenerator[Video, None], last_id: str | None
    ) -> AsyncGenerator[str, None]:
        """The text of the events.

        Args:
            changes: `Videos.watch`; is closed at the end, or when the client leaves.
            last_id: of the event that the client saw last.
        """
        pending: asyncio.Task[Video] | None = None
        self.open += 1
        try:
            yield f"retry: {_RECONNECT_MS}\n\n"
            while True:
                pending = asyncio.ensure_future(anext(changes))
                while not (await asyncio.wait({pending}, timeout=KEEP_ALIVE_S))[0]:
                    yield ": keep-alive\n\n"
                try:
                    video = pending.result()
                except StopAsyncIteration:
                    return
                except (InvalidRequest, JobFailed):  # deleted
                    yield _event("deleted", VideoDeleted(id=video_id).model_dump_json())
                    return
                data = video.model_dump_json()
                if event_id(data) != last_id:
                    yield _event(video.status, data)
        finally:
            # No waiting here: where the client left, this task has been cancelled, and every wait would be too.
            if pending is not None and not pending.done():
                pending.cancel()
            else:
                await changes.aclose()
            self.open -= 1
            logger.info("events ended", extra={"job": video_id, "open": self.open})


def _event(name: str, data: str) -> str:
    # One line: pydantic's JSON has no line breaks, and escapes those within strings.
    return f"id: {event_id(data)}\nevent: {name}\ndata: {data}\n\n"
