"""Redirect from a route prefix to the page below it, whose relative links need the slash at the end."""

from __future__ import annotations

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class SlashAfterPrefix:
    """ASGI middleware that redirects from `/api` to `/api/` if `/api` is the route prefix."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Redirect, or pass a request on."""
        prefix = scope.get("root_path", "")
        if scope["type"] != "http" or not prefix or scope["path"] != prefix:
            await self._app(scope, receive, send)
            return
        query = scope.get("query_string", b"").decode("latin-1")
        # Two slashes at the beginning would lead to another host.
        answer = RedirectResponse(f"/{prefix.strip('/')}/{'?' if query else ''}{query}")
        await answer(scope, receive, send)
