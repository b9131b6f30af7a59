"""The FastAPI application. Runs under Serve and, for tests, under any other ASGI server: knows nothing of Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from serve_app.config import Config
from serve_app.gateway import errors, webhooks
from serve_app.gateway.auth import AnyCaller, Guard, bearer
from serve_app.gateway.middleware import Exchange
from serve_app.gateway.routes import router
from serve_app.gateway.schemas import ErrorEnvelope, ModelCard, ModelList
from serve_app.gateway.service import Videos, Wake
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from serve_app.tiny.vocabulary import NOTE

Ready = Callable[[], Awaitable[str | None]]
"""None, or the reason why no video can be made now."""

_PAGE = Path(__file__).parent / "page" / "index.html"
_READY_S = 1.0


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI of answers in the envelope."""
    return {status: errors.RESPONSES.get(status, {"model": ErrorEnvelope}) for status in statuses}


_GUARDED = _only(401, 403, 429, 500)


def create_app(
    config: Config, store: JobStore, storage: Storage, wake: Wake, ready: Ready, *, answer_request_id: bool = True
) -> FastAPI:
    """The API and the page.

    Args:
        store: started.
        answer_request_id: whether `x-request-id` is ours to send; Serve's proxy sends its own.
    """
    app = FastAPI(
        title="serve_app", summary="Wan2.2 text to video: the OpenAI videos API", redoc_url=None, redirect_slashes=False
    )
    app.state.guard = Guard(config.auth, store.keys, config.gateway.num_replicas)
    app.include_router(router(Videos(config, store, storage, wake)))
    app.include_router(webhooks.router(config, store.database))
    app.add_middleware(Exchange, body_bytes=config.limits.body_bytes, answer_request_id=answer_request_id)
    errors.install(app)
    card = model_card(config)
    readiness = _Readiness(store, ready)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"))

    guarded: dict[str, Any] = {"tags": ["models"], "dependencies": bearer(config.auth)}

    @app.get("/v1/models", **guarded, responses=_GUARDED)
    async def models(who: AnyCaller) -> ModelList:
        """What is served, with limits and defaults."""
        return ModelList(data=[card])

    @app.get("/v1/models/{model_id:path}", **guarded, responses=_GUARDED | _only(404))
    async def model(model_id: str, who: AnyCaller) -> ModelCard:
        """One model."""
        if model_id != card.id:
            raise errors.ApiError(404, "not_found", f"There is no model {model_id[:80]!r}.", "model_id")
        return card

    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """200 while this process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], responses=_only(503, 500))
    async def readyz() -> dict[str, str]:
        """200 when a video can be made now, or will be once an operator ends a pause (`status` `paused`); 503 with the
        reason when not."""
        reason = await readiness.reason()
        if reason is not None:
            raise errors.ApiError(503, "not_ready", reason, retry=True)
        # Not 503: who balances load would turn away those whose jobs can well wait.
        return {"status": "paused" if readiness.paused else "ready"}

    return app


def model_card(config: Config) -> ModelCard:
    """The model of a configuration, as `/v1/models` shows it."""
    limits = config.limits.model_dump(
        include={"prompt_chars", "pixels", "num_frames", "num_inference_steps", "fps", "queued_jobs"}
    )
    return ModelCard(
        id=config.model.name,
        created=int(time.time()),
        limits=limits,
        defaults=config.defaults.model_dump(),
        note=NOTE if config.model.bundled else None,
    )


class _Readiness:
    """Whether a video can be made, looked up at most once a second however many ask."""

    def __init__(self, store: JobStore, ready: Ready) -> None:
        self._store = store
        self._ready = ready
        self.paused = False
        self._reason: str | None = None
        self._looked_at = float("-inf")
        self._looking = asyncio.Lock()

    async def reason(self) -> str | None:
        async with self._looking:
            if time.monotonic() - self._looked_at >= _READY_S:
                self._reason = await self._look()
                self._looked_at = time.monotonic()
            return self._reason

    async def _look(self) -> str | None:
        try:
            self.paused = await asyncio.wait_for(self._store.paused_since(), 5) is not None
        except Exception as error:
            return f"The job store does not answer: {type(error).__name__}."
        try:
            return await asyncio.wait_for(self._ready(), 5)
        except Exception as error:
            return f"The pipeline's state is unknown: {type(error).__name__}."
