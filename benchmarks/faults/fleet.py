"""Gateways and dispatchers to be killed: as processes without Ray and without a model, or as deployments of Serve.

`python -m benchmarks.faults.fleet gateway|dispatcher ARGS.json PORT` is one of the processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import psutil
import uvicorn
import yaml

from benchmarks.ports import free_port
from serve_app.config import Config, validate
from serve_app.dispatch.dispatcher import Dispatcher
from serve_app.dispatch.rabbitmq import broker
from serve_app.errors import JobFailed, one_line
from serve_app.events import Event
from serve_app.gateway.app import create_app
from serve_app.job_spec import JobSpec
from serve_app.jobs.store import JobStore
from serve_app.notify.notifier import Notifier
from serve_app.server import Server
from serve_app.storage import Storage
from tests.support.fakes import FakePipeline

TINY = Path("configs/tiny.yaml")


async def gateway(config: Config, port: int) -> None:
    messenger = broker(config)
    store = JobStore.of(config, messenger)
    await store.start()
    if messenger is not None:
        messenger.start()

    async def nothing() -> None:
        return None

    app = create_app(config, store, Storage(config.storage_options), nothing, nothing)
    await uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off")).serve()


class Pipeline(FakePipeline):
    """A pipeline that raises what the real one does when it has waited for a storage for long enough."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage, step_s=0.1, saving=True)

    async def __call__(self, job: JobSpec) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(super().__call__(job)) as events:
                async for event in events:
                    yield event
        except OSError as error:
            raise JobFailed("store_failed", one_line(error), retryable=True) from None


async def dispatcher(config: Config) -> None:
    messenger = broker(config)
    store = JobStore.of(config)
    await store.start()
    if messenger is not None:
        messenger.start()
    storage = Storage(config.storage_options)
    dispatching = Dispatcher(store, storage, Pipeline(storage), config.dispatcher, messenger)
    notifier = Notifier(store.database, config)
    dispatching.start()
    notifier.start()
    while True:
        await asyncio.sleep(0.5)
        dispatching.raise_if_ended()
        notifier.raise_if_ended()


class Fleet(ABC):
    """The gateways and dispatchers."""

    urls: list[str]

    @abstractmethod
    async def start(self) -> None:
        """Start all of them, and wait until they answer."""

    @abstractmethod
    def kill(self, kind: str, rng: random.Random) -> None:
        """Send SIGKILL to one of them.

        Raises:
            LookupError: there is none at the moment.
        """

    @abstractmethod
    def stop(self) -> None:
        """Stop all of them for good."""


class Processes(Fleet):
    """Two gateways and two dispatchers as processes, each started again half a second after it ends."""

    def __init__(self, folder: Path, args: dict[str, Any]) -> None:
        self._file = folder / "args.json"
        self._file.write_text(json.dumps(args))
        self._log = (folder / "fleet.log").open("ab")
        ports = [free_port() for _ in range(2)]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self._wanted = [("gateway", ports[0]), ("gateway", ports[1]), ("dispatcher", 0), ("dispatcher", 1)]
        self._running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._supervisor = asyncio.create_task(self._supervise())

    async def _supervise(self) -> None:
        while True:
            self._fill()
            await asyncio.sleep(0.5)

    def _fill(self) -> None:
        for key in self._wanted:
            process = self._running.get(key)
            if process is None or process.poll() is not None:
                kind, port = key
                command = ["-m", "benchmarks.faults.fleet", kind, str(self._file), str(port)]
                self._running[key] = subprocess.Popen([sys.executable, *command], stdout=self._log, stderr=self._log)

    def kill(self, kind: str, rng: random.Random) -> None:
        alive = [p for (name, _), p in self._running.items() if name == kind and p.poll() is None]
        if not alive:
            raise LookupError(kind)
        rng.choice(alive).kill()

    def stop(self) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
        for process in self._running.values():
            process.kill()
            process.wait()


class Ray(Fleet):
    """The deployments of configs/tiny.yaml, which Serve starts again by itself."""

    def __init__(self, folder: Path, args: dict[str, Any]) -> None:
        content = yaml.safe_load(TINY.read_text(encoding="utf-8"))
        for application in content["applications"]:
            application["args"] = args
        file = folder / "serve.yaml"
        file.write_text(yaml.safe_dump(content))
        self._deployment = Server(file, port=free_port(), own_ray=True, dashboard=False)
        self.urls = [self._deployment.url]

    async def start(self) -> None:
        self._deployment.start()
        await asyncio.to_thread(self._deployment.wait_ready)

    def kill(self, kind: str, rng: random.Random) -> None:
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if (process.cmdline() or [""])[0].startswith(f"ray::ServeReplica:gateway:{kind}"):
                    found.append(process.pid)
        if not found:
            raise LookupError(kind)
        os.kill(rng.choice(found), signal.SIGKILL)

    def stop(self) -> None:
        self._deployment.stop()


if __name__ == "__main__":
    kind, file, port = sys.argv[1:]
    config = validate(json.loads(Path(file).read_text()))
    asyncio.run(gateway(config, int(port)) if kind == "gateway" else dispatcher(config))
