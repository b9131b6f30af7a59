"""The page of the API's description: Swagger UI, whose files come with the package fastapi-offline."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, Response

from serve_app.gateway.http.errors import ApiError
from serve_app.gateway.http.routing import Routes

# No other site may embed our pages, where a click could be made to mean something else (clickjacking).
PAGE_HEADERS = {
    "content-security-policy": "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
_KINDS = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
}


def router(title: str) -> APIRouter:
    """Return the routes of the page and its files. The page's links are relative, so they work behind a prefix."""
    routes = Routes()
    folder = files("fastapi_offline") / "static"

    @routes.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="data:,",
            swagger_ui_parameters={
                "validatorUrl": None
            },  # otherwise the page sends the description to a server on the internet
        )
        page.headers.update(PAGE_HEADERS)
        return page

    @routes.get("/docs/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in _KINDS:
            raise ApiError(404, "not_found", f"There is no '/docs/{name[:80]}'.")
        headers = {"content-type": _KINDS[name], "cache-control": "public, max-age=86400"}
        return Response((folder / name).read_bytes(), headers=headers | {"x-content-type-options": "nosniff"})

    return routes
