"""The application with a notifier at work, for tests of webhooks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import Request

from serve_app.config import Config, MailConfig, WebhooksConfig
from serve_app.gateway.app import create_app
from serve_app.gateway.http.auth import Caller, Scope, caller
from serve_app.jobs.store import JobStore
from serve_app.notify.notifier import Notifier
from serve_app.storage import Storage
from tests.support.fakes import until

OPTIONS = WebhooksConfig(
    allow_http=True,
    allow_networks=(ip_network("127.0.0.0/8"),),
    retries_s=(0, 0, 0),
    timeout_s=5,
    endpoints=5,
)
URL = "https://hooks.example.com/videos"


@dataclass
class Site:
    """The application on a store of its own, with a notifier at work. A key is named by the header `x-key`."""

    store: JobStore
    http: httpx.AsyncClient

    async def create(self, url: str = URL, key: str = "", **fields: Any) -> dict[str, Any]:
        body = {"url": url, "name": "mine", "event_types": ["video.completed", "video.failed"], **fields}
        answer = await self.http.post("/v1/webhook_endpoints", json=body, headers={"x-key": key})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def log(self, endpoint: dict[str, Any]) -> list[dict[str, Any]]:
        answer = await self.http.get(f"/v1/webhook_endpoints/{endpoint['id']}/deliveries")
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"])

    async def ended(self, endpoint: dict[str, Any], count: int = 1) -> list[dict[str, Any]]:
        async def look() -> list[dict[str, Any]] | None:
            rows = await self.log(endpoint)
            return rows if len(rows) == count and all(row["status"] != "pending" for row in rows) else None

        return list(await until(look))


async def by_header(request: Request) -> Caller:
    """Stand in for keys by `x-key: ada read create`; without it the caller is one who needs no key."""
    key, *scopes = request.headers.get("x-key", "").split() or [""]
    if not key:
        return Caller()
    known: dict[str, Scope] = {"create": "create", "read": "read", "admin": "admin"}
    return Caller(key, frozenset(known[scope] for scope in scopes or ["create", "read"]))


def config_at(folder: Path, webhooks: WebhooksConfig = OPTIONS, mail: MailConfig | None = None) -> Config:
    config = Config(home=str(folder), webhooks=webhooks, mail=mail)
    return config.model_copy(update={"dispatcher": config.dispatcher.model_copy(update={"poll_s": 0.03})})


@pytest.fixture
async def site(store: JobStore, tmp_path: Path) -> AsyncIterator[Site]:
    config = config_at(tmp_path)

    async def nothing() -> None:
        return None

    app = create_app(config, store, Storage(config.storage_url), nothing, nothing)
    app.dependency_overrides[caller] = by_header
    notifier = Notifier(store.database, config)
    notifier.start()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        yield Site(store, http)
    notifier.raise_if_ended()
    await notifier.stop()


@pytest.fixture
async def sdk(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    """Yield the SDK over the same application, on a real socket, since it has an httpx of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = site.http._transport.app  # type: ignore[attr-defined]
    listening = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(listening.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client
    listening.should_exit = True
    await serving
