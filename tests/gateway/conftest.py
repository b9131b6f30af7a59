from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from serve_app.accounts.keys import KeyLimits, Scope
from serve_app.config import AuthConfig, Config, Defaults, GatewayConfig, Limits
from serve_app.config import DispatcherConfig as Options
from serve_app.config import StorageConfig as StorageOptions
from serve_app.dispatch.dispatcher import Dispatcher
from serve_app.errors import Unavailable
from serve_app.gateway.app import create_app
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from serve_app.wan.cost import video_tflop
from tests.support.databases import empty_sqlite, postgres_url, store, store_url
from tests.support.disks import small_disk
from tests.support.fakes import FakePipeline, until
from tests.support.links import link_to
from tests.support.quick_app import share
from tests.support.shapes import A14B
from tests.support.sites import sdk, site

__all__ = [
    "Server",
    "client",
    "empty_sqlite",
    "held",
    "link_to",
    "postgres_url",
    "sdk",
    "server",
    "site",
    "small_disk",
    "store",
    "store_url",
]

share()


@dataclass
class Server:
    """A server in one process: everything but Ray and the model."""

    config: Config
    store: JobStore
    storage: Storage
    pipeline: FakePipeline
    dispatcher: Dispatcher
    app: FastAPI
    http: httpx.AsyncClient
    reason: str | None = None
    """The reason why no video can be made now."""
    never: bool = False
    """True if, as far as is known, no video ever could be made."""

    async def key(self, *scopes: Scope, **limits: Any) -> tuple[str, dict[str, str]]:
        """Create a key, and return its id and the headers of a call with it."""
        key, text = await self.store.keys.create("test", scopes or ("create", "read"), KeyLimits(**limits))
        return key.id, {"authorization": f"Bearer {text}"}

    async def create(self, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
        body = {"prompt": "a red circle moves right", **fields}
        answer = await self.http.post("/v1/videos", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def ended(self, video_id: str) -> dict[str, Any]:
        async def look() -> dict[str, Any] | None:
            video = (await self.http.get(f"/v1/videos/{video_id}")).json()
            return video if video["status"] in ("completed", "failed") else None

        return dict(await until(look))

    async def completed(self, **fields: Any) -> dict[str, Any]:
        video = await self.ended((await self.create(**fields))["id"])
        assert video["status"] == "completed", video["error"]
        return video


@pytest.fixture
def auth() -> AuthConfig:
    """The section `auth`. Modules about keys replace it."""
    return AuthConfig()


@pytest.fixture
def storage_options() -> StorageOptions:
    """The section `storage`: a folder in `home`."""
    return StorageOptions(min_free_mib=1)


@pytest.fixture
async def server(
    tmp_path: Path, auth: AuthConfig, storage_options: StorageOptions, empty_sqlite: Path
) -> AsyncIterator[Server]:
    config = Config(
        home=str(tmp_path),
        auth=auth,
        storage=storage_options,
        gateway=GatewayConfig(max_ongoing_requests=16),
        defaults=Defaults(width=128, height=128, num_frames=33, num_inference_steps=4),
        limits=Limits(pixels=512 * 288, num_frames=81, queued_jobs=30, body_bytes=50_000),
        dispatcher=Options(poll_s=0.03, retry_s=0.01, late_outputs_s=0.2, running_jobs=8),
    )
    shutil.copy(empty_sqlite, tmp_path / "jobs.db")
    store, storage = (
        JobStore(config.store_url, 0.2, work_of=partial(video_tflop, A14B)),
        Storage(config.storage_options),
    )
    await store.start()
    pipeline = FakePipeline(storage)
    dispatcher = Dispatcher(store, storage, pipeline, config.dispatcher)
    dispatcher.start()

    async def wake() -> None:
        dispatcher.wake()

    async def ready() -> str | None:
        if made.never:
            raise Unavailable(str(made.reason))
        return made.reason

    app = create_app(config, store, storage, wake, ready)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        made = Server(config, store, storage, pipeline, dispatcher, app, http)
        yield made
    if pipeline.gate is not None:
        pipeline.gate.set()
    await dispatcher.stop()
    await store.close()


@pytest.fixture
def held(server: Server) -> asyncio.Event:
    """An event for which every run waits half-way."""
    server.pipeline.gate = asyncio.Event()
    return server.pipeline.gate


@asynccontextmanager
async def listening(app: FastAPI, port: int = 0) -> AsyncIterator[str]:
    """Serve the application on a real loopback socket, and return its URL. Port 0 is any free one."""
    listener = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))

    async def started() -> bool:
        return server.started

    await until(started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    """The unmodified openai SDK; its `base_url` is that of a real socket."""
    async with (
        listening(server.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=2) as client,
    ):
        yield client
