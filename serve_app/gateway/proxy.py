"""What Serve's HTTP proxy does before a request reaches the gateway. Loaded by the proxy: see configs/tiny.yaml."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

# By these a client could have its own request cut off, which ends its stream, or kept alive after it has left, which
# holds a place in the gateway. They are meant for a load balancer that Serve brings along.
_HINTS = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}


class NoHints:
    """ASGI middleware that takes a client's hints to Serve out of its requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _HINTS]
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names."""
    return [Middleware(NoHints)]
