"""Counts and times the answers of the API, by kind of route and class of status."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.metrics import catalog as metrics

# The kind of a path below a video, and of the first part of every other path.
_OF_A_VIDEO = {"content": "content", "events": "events"}
_FIRST = {
    "webhook_endpoints": "webhooks",
    "webhook_event_types": "webhooks",
    "webhook_events": "webhooks",
    "models": "models",
    "healthz": "health",
    "readyz": "health",
    "docs": "page",
    "openapi.json": "page",
    "": "page",
}


class Measured:
    """ASGI middleware that records every answer, outermost so that refusals of the others count too.

    Args:
        app: application below.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and record its answer once it is complete."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            route = route_of(scope["method"], scope["path"].removeprefix(scope.get("root_path", "")))
            metrics.http_requests.inc(route=route, status=f"{status // 100}xx")
            if route not in metrics.STREAMED:
                metrics.http_seconds.observe(time.monotonic() - began, route=route)


def route_of(method: str, path: str) -> str:
    """Return the kind of a route, one of `metrics.ROUTES`."""
    first, *rest = path.strip("/").removeprefix("v1/").split("/")
    if first != "videos":
        return _FIRST.get(first, metrics.OTHER)
    if len(rest) > 1 and rest[1] in _OF_A_VIDEO:
        return _OF_A_VIDEO[rest[1]]
    if method in ("GET", "HEAD"):
        return "get" if rest else "list"
    return "create" if not rest or rest[-1] == "remix" else "change"
