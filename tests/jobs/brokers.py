"""The RabbitMQ that tests run on, with a queue of each test's own, and a link to it that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator

import pytest

from serve_app import config
from serve_app.jobs.rabbitmq import RabbitMQ
from tests.jobs.fakes import until

SERVER = os.environ.get("WAN_TEST_RABBITMQ", "amqp://guest:guest@127.0.0.1:5672/")


@pytest.fixture
async def queue_options() -> AsyncIterator[config.Queue]:
    """A queue's name of the test's own, and its URL; the queue is deleted afterwards."""
    import aio_pika

    try:
        connection = await aio_pika.connect(SERVER, timeout=5)
    except (OSError, TimeoutError) as error:
        reason = f"RabbitMQ at 127.0.0.1:5672 cannot be used: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    name = f"wan-test-{secrets.token_hex(6)}"
    yield config.Queue(transport="rabbitmq", url=SERVER, name=name, poll_s=30)
    channel = await connection.channel()
    for queue in (name, f"{name}.dead"):
        await channel.queue_delete(queue)
    await connection.close()


class Link:
    """A way to the broker that can be cut and joined again. Connections that are cut are closed; new ones refused."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.stalled = asyncio.Event()
        self.stalled.set()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    async def join(self) -> None:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    def stall(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self.stalled.clear()

    def flow(self) -> None:
        self.stalled.set()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", 5672)
        self._writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            self._writers -= {writer, far_writer}
            for one in (writer, far_writer):
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self.stalled.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    link = Link()
    await link.join()
    yield link
    link.flow()
    await link.cut()


async def connected(broker: RabbitMQ) -> RabbitMQ:
    """A started broker, once it is connected."""

    async def look() -> bool:
        return broker.connected

    broker.start()
    await until(look)
    return broker
