"""The FastAPI application. Knows nothing of Ray, so that it runs under Serve and, for tests, any other ASGI server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse

from serve_app import __version__
from serve_app.config import Config
from serve_app.gateway.http import docs, errors
from serve_app.gateway.http.auth import AnyCaller, Guard, bearer
from serve_app.gateway.http.envelope import ErrorEnvelope
from serve_app.gateway.http.measure import Measured
from serve_app.gateway.http.middleware import Exchange
from serve_app.gateway.http.origins import Cors
from serve_app.gateway.http.prefix import SlashAfterPrefix
from serve_app.gateway.http.routing import Routes
from serve_app.gateway.readiness import Readiness, Ready
from serve_app.gateway.schemas import Estimates, ModelCard, ModelList, ReadyState
from serve_app.gateway.videos.routes import router
from serve_app.gateway.videos.service import Videos, Wake
from serve_app.gateway.webhooks import routes as webhooks
from serve_app.jobs.estimate import Pace
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from serve_app.tiny.vocabulary import NOTE

_PAGE = Path(__file__).parent / "page"


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI of some error answers."""
    return {status: errors.RESPONSES.get(status, {"model": ErrorEnvelope}) for status in statuses}


_ANY = _only(400, 415, 500)
_GUARDED = _ANY | _only(401, 403, 429)


def create_app(
    config: Config, store: JobStore, storage: Storage, wake: Wake, ready: Ready, *, answer_request_id: bool = True
) -> FastAPI:
    """Return the application: the API and the page.

    Args:
        config: all options.
        store: job store, which has been started.
        storage: where videos are.
        wake: tells a dispatcher that there is a new job.
        ready: looks whether videos can be made.
        answer_request_id: whether to send the header `x-request-id`; Serve's proxy sends its own.
    """
    app = FastAPI(
        title="serve_app",
        version=__version__,
        summary="Wan2.2 text to video: the OpenAI videos API",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.guard = Guard(config.auth, store.keys, config.gateway)
    videos = Videos(config, store, storage, wake)
    app.include_router(router(videos))
    app.include_router(webhooks.router(config, store.database))
    app.add_middleware(Exchange, body_bytes=config.limits.body_bytes, answer_request_id=answer_request_id)
    app.add_middleware(SlashAfterPrefix)
    app.add_middleware(Cors, options=config.gateway)  # outside: the answers of all others need its headers
    app.add_middleware(Measured)
    errors.install(app)
    app.include_router(docs.router(app.title))
    app.include_router(_rest(config, Readiness(store, videos.admission, ready), store))
    return app


def _rest(config: Config, readiness: Readiness, store: JobStore) -> APIRouter:
    """Return the routes of the page, the model and health."""
    routes = Routes()
    card = model_card(config)

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_page(), headers=docs.PAGE_HEADERS)

    async def current() -> ModelCard:
        return card.model_copy(update={"estimates": estimates(await store.pace())})

    guarded: dict[str, Any] = {"tags": ["models"], "dependencies": bearer(config.auth)}

    @routes.get("/v1/models", **guarded, responses=_GUARDED)
    async def models(who: AnyCaller) -> ModelList:
        """List the models that are served, with limits and defaults."""
        return ModelList(data=[await current()])

    @routes.get("/v1/models/{model_id:path}", **guarded, responses=_GUARDED | _only(404))
    async def model(model_id: str, who: AnyCaller) -> ModelCard:
        """Return one model."""
        if model_id != card.id:
            raise errors.ApiError(404, "not_found", f"There is no model {model_id[:80]!r}.", "model_id")
        return await current()

    @routes.get("/healthz", tags=["health"], responses=_ANY)
    async def healthz() -> dict[str, str]:
        """Answer 200 while this process works."""
        return {"status": "ok"}

    @routes.get("/readyz", tags=["health"], responses=_ANY | _only(503))
    async def readyz() -> ReadyState:
        """Answer 200 while jobs are accepted, 503 with the reason otherwise.

        The status is `ready`; or, with a `reason`, `paused` by an operator or `degraded`, e.g. while a process is
        replaced: then jobs wait. It is 503 as well if no video could be made since the start.
        """
        return await readiness.state()

    return routes


def model_card(config: Config) -> ModelCard:
    """Return the model of a configuration, as `/v1/models` shows it."""
    limits = config.limits.model_dump(exclude={"body_bytes"})
    return ModelCard(
        id=config.model.name,
        created=int(time.time()),
        limits=limits,
        defaults=config.defaults.model_dump(),
        note=NOTE if config.model.bundled else None,
    )


def estimates(pace: Pace) -> Estimates | None:
    """Return how good the estimates of the latest videos were; None if none of them had one."""
    errors = pace.errors
    if not errors:
        return None
    median, p90 = (round(errors[-(-len(errors) * share // 10) - 1], 3) for share in (5, 9))
    return Estimates(videos=len(errors), median_error=median, p90_error=p90, p90_factor=round(pace.p90_factor, 3))


def _page() -> str:
    """Return the page as one document, so that it needs no further requests: index.html with its style and script."""
    page, style, script = ((_PAGE / name).read_text(encoding="utf-8") for name in ("index.html", "page.css", "page.js"))
    return page.replace("/* page.css */\n", style).replace("// page.js\n", script)
