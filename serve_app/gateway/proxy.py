"""Middleware of Serve's HTTP proxy, in front of the gateway. The proxy loads it: see configs/tiny.yaml."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

# With these headers a client could have its request cut off, which ends its stream, or kept alive after it has left,
# which occupies a place in the gateway. They are meant for a load balancer of Serve's own.
_HINTS = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}


class NoHints:
    """ASGI middleware that removes a client's hints to Serve from its requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, without the hints."""
        if "headers" in scope:
            headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _HINTS]
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Return the middleware; `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names this function."""
    return [Middleware(NoHints)]
