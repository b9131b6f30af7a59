"""Routes that follow HTTP: HEAD wherever there is GET, and JSON bodies that are declared as such and are UTF-8."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from serve_app.gateway.http.forms import check_json

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class _Route(APIRoute):
    def get_route_handler(self) -> _Handler:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def checked(request: Request) -> Response:
            check_json(request, await request.body())
            return await handle(request)

        return checked


class Routes(APIRouter):
    """An `APIRouter` that answers HEAD wherever it answers GET, and checks JSON bodies before they are parsed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(route_class=_Route, **options)

    def get(self, path: str, **options: Any) -> Callable[[Any], Any]:
        """Route GET and, hidden from OpenAPI, HEAD. The server leaves out the body of an answer to HEAD."""
        hidden = self.head(path, **options | {"include_in_schema": False})
        shown = super().get(path, **options)
        return lambda endpoint: shown(hidden(endpoint))
