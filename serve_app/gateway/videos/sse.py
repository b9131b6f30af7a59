"""The changes of a video as Server-Sent Events.

Each event is the whole resource. It is named after the status, and its id is a digest of the resource. So the server
keeps nothing for a client that reconnects: with its `Last-Event-ID` it gets the next state that differs from the one it
saw, or 204 if that was the last one, at which browsers stop asking.
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

# Seconds between two comments, which keep proxies from closing a quiet stream.
KEEP_ALIVE_S = 15.0
_RECONNECT_MS = 2000


def event_id(data: str) -> str:
    """Return the id of a state: a digest of its JSON."""
    return hashlib.sha256(data.encode()).hexdigest()[:16]


def is_end(video: Video, last_id: str | None) -> bool:
    """Return whether the client has seen the last event of a video."""
    return video.status in ("completed", "failed") and last_id == event_id(video.model_dump_json())


class Streams:
    """The event streams of one process.

    Args:
        most: number of streams at once. Each counts as one of the replica's `max_ongoing_requests`, for minutes or
            hours.

    Attributes:
        open: number of streams now.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.open = 0

    def check_not_full(self) -> None:
        """Check that one more stream may be opened.

        Raises:
            ApiError: 503, there are too many.
        """
        if self.open >= self._most:
            message = f"{self.open} clients follow videos here already; ask for the video's state instead."
            raise ApiError(503, "too_many_streams", message, retry=True, retry_after="5")

    async def stream(
        self, video_id: str, changes: AsyncGenerator[Video, None], last_id: str | None
    ) -> AsyncGenerator[str, None]:
        """Yield the text of the events.

        Args:
            video_id: id of the video.
            changes: what `Videos.watch` returns. It is closed at the end, or when the client leaves.
            last_id: id of the event that the client saw last.
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
            # Nothing is awaited if the client left: this task was cancelled then, and any wait would be cancelled too.
            if pending is not None and not pending.done():
                pending.cancel()
            else:
                await changes.aclose()
            self.open -= 1
            logger.info("events ended", extra={"job": video_id, "open": self.open})


def _event(name: str, data: str) -> str:
    # The data is one line: pydantic's JSON has no line breaks, and escapes those inside of strings.
    return f"id: {event_id(data)}\nevent: {name}\ndata: {data}\n\n"
