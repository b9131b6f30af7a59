"""The RabbitMQ that tests run on, with a queue of each test's own."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator

import pytest

from serve_app import config
from serve_app.dispatch.rabbitmq import RabbitMQ
from tests.support.fakes import until
from tests.support.links import Link

PORT = 5672
SERVER = os.environ.get("WAN_TEST_RABBITMQ", f"amqp://guest:guest@127.0.0.1:{PORT}/")


@pytest.fixture
async def queue_options() -> AsyncIterator[config.QueueConfig]:
    """Yield a queue of the test's own, deleted afterwards, and the broker's URL."""
    import aio_pika

    try:
        connection = await aio_pika.connect(SERVER, timeout=30)
    except (OSError, TimeoutError) as error:
        reason = f"RabbitMQ at 127.0.0.1:{PORT} cannot be used: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    name = f"wan-test-{secrets.token_hex(6)}"
    yield config.QueueConfig(transport="rabbitmq", url=SERVER, name=name, poll_s=30)
    channel = await connection.channel()
    for queue in (name, f"{name}.dead"):
        await channel.queue_delete(queue)
    await connection.close()


def via(link: Link) -> str:
    """Return the URL of the broker at the other end of a link."""
    return f"amqp://guest:guest@127.0.0.1:{link.port}/"


async def connected(broker: RabbitMQ) -> RabbitMQ:
    """Return a started broker, once it is connected."""

    async def look() -> bool:
        return broker.connected

    broker.start()
    await until(look)
    return broker
