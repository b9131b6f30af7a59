"""RabbitMQ as the messenger between whoever creates jobs and the dispatchers.

A message holds the id of a waiting job and is only a hint. The store decides which job a dispatcher then takes: the
order of `serve_app.jobs.order` has fairness and ageing, which no broker's priorities can express. So the queue is a
plain durable one, the same on RabbitMQ 3.10 and 4. Whatever happens to the broker or its messages, no job is lost or
run twice; at worst the next look at the store finds it.

Knows nothing of the store. The package aio-pika is imported when a `RabbitMQ` is made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from serve_app import config
from serve_app.db.tables import id_time
from serve_app.errors import ConfigError, one_line, without_password
from serve_app.logs import get_logger

if TYPE_CHECKING:
    from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue

logger = get_logger(__name__)

# Shortest and longest seconds between two tries to connect; each wait doubles the one before.
_RETRY_S = (0.2, 5.0)
# Seconds without an answer after which a broker is away. The protocol's heartbeat finds a silent one after twice 10 s.
_CONNECT_S = 5.0
_HEARTBEAT_S = 10


class RabbitMQ:
    """One connection to the broker, made anew whenever it is lost.

    Args:
        url: the broker's URL. It is shown without its password only.
        options: the name of the queue, and how long an announcement may take.

    Raises:
        ConfigError: aio-pika is not installed.
    """

    def __init__(self, url: str, options: config.QueueConfig) -> None:
        try:
            import aio_pika  # noqa: F401 (a missing package is an error before anything starts)

            logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # it logs at each try what we log once
        except ImportError as error:
            raise ConfigError(f"queue.transport has value 'rabbitmq': needs the package {error.name!r}") from None
        self._url = url
        self.poll_s = options.poll_s
        self._name = options.name
        self._timeout_s = options.publish_timeout_s
        self.heard: Callable[[], object] | None = None
        self._task: asyncio.Task[None] | None = None
        self._channel: AbstractChannel | None = None
        self._queue: AbstractQueue | None = None
        self._lost = asyncio.Event()
        self._held: list[AbstractIncomingMessage] = []
        self._wanted = 0
        self._consuming: str | None = None

    @property
    def connected(self) -> bool:
        """Return whether the broker was there when last heard of."""
        return self._queue is not None

    def start(self) -> None:
        """Connect, as a task of the running event loop. A broker that is away is tried again without end."""
        self._task = asyncio.create_task(self._keep(), name="rabbitmq")

    async def away(self) -> str | None:
        """Return why the broker cannot be reached now; None if it can.

        Raises:
            ConfigError: it refuses the user, the password or the vhost, so that waiting would not help.
        """
        from aio_pika import connect
        from aio_pika.exceptions import AuthenticationError, InvalidFrameError, ProbableAuthenticationError

        said = f"queue.url has value {without_password(self._url)!r}"
        try:
            connection = await connect(self._url, timeout=_CONNECT_S)
        except TimeoutError:
            return f"no answer within {_CONNECT_S:g} s"
        except (AuthenticationError, ProbableAuthenticationError):
            raise ConfigError(f"{said}: the broker refused this user and password") from None
        except InvalidFrameError:
            # The broker sent "close" instead of opening the vhost; aiormq (7.2) does not pass the reason on.
            raise ConfigError(f"{said}: the broker has no such vhost, or not for this user") from None
        except Exception as error:
            return one_line(error)
        await _closed(connection)
        return None

    async def close(self) -> None:
        """Disconnect. The broker gives messages that were not settled to other dispatchers."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=_CONNECT_S)

    async def announce(self, video_ids: Sequence[str]) -> bool:
        """Announce waiting jobs; return whether the broker has the messages on its disk. Raises nothing."""
        from aio_pika import DeliveryMode, Message

        channel = self._channel
        if channel is None:
            return False
        try:
            async with asyncio.timeout(self._timeout_s):
                for video_id in video_ids:
                    message = Message(video_id.encode(), delivery_mode=DeliveryMode.PERSISTENT)
                    # The broker confirms it, or refuses it if the queue is gone.
                    await channel.default_exchange.publish(message, self._name, mandatory=True)
        except Exception as error:
            self._give_up("not announced", error, channel)
            return False
        return True

    async def is_empty(self) -> bool:
        """Return whether the broker holds no message, so that waiting jobs have to be announced again."""
        channel = self._channel
        if channel is None:
            return False
        try:
            queue = await channel.declare_queue(self._name, passive=True, timeout=self._timeout_s)
        except Exception as error:
            self._give_up("queue not found", error, channel)
            return False
        return not queue.declaration_result.message_count

    def take_messages(self) -> list[AbstractIncomingMessage]:
        """Return the messages that have come, each to be handed to `settle`."""
        held, self._held = self._held, []
        return held

    async def settle(self, messages: Sequence[AbstractIncomingMessage], done: int) -> None:
        """Acknowledge the first `done` messages and hand the rest back, for dispatchers with free places."""
        for index, message in enumerate(messages):
            try:
                async with asyncio.timeout(self._timeout_s):
                    await (message.ack() if index < done else message.nack(requeue=True))
            except Exception as error:  # the message went with its channel: the broker delivers it again
                logger.info("message not settled", extra={"error": one_line(error)})
                return

    async def listen_for(self, count: int) -> None:
        """Take up to `count` messages at a time, as many as jobs could begin; 0 takes none."""
        self._wanted = count
        if self._queue is None or (self._consuming is None) == (count == 0):
            return
        channel = self._channel
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._listen()
        except Exception as error:
            self._give_up("not listening", error, channel)
            return
        if not count:
            await self.settle(self.take_messages(), 0)

    async def _listen(self) -> None:
        """Begin or stop taking messages, depending on how many are wanted."""
        assert self._queue is not None and self._channel is not None
        if self._wanted and self._consuming is None:
            await self._channel.set_qos(prefetch_count=self._wanted)
            self._consuming = await self._queue.consume(self._received)
        elif not self._wanted and self._consuming is not None:
            tag, self._consuming = self._consuming, None
            await self._queue.cancel(tag)

    async def _received(self, message: AbstractIncomingMessage) -> None:
        with suppress(UnicodeDecodeError):
            if id_time(message.body.decode()) is not None:
                self._held.append(message)
                if self.heard is not None:
                    self.heard()
                return
        logger.error("message is no id of a job", extra={"queue": f"{self._name}.dead"})
        await message.reject(requeue=False)

    async def _keep(self) -> None:
        from aio_pika import connect

        pause_s = _RETRY_S[0]
        away = None
        while True:
            connection = None
            try:
                connection = await connect(self._url, timeout=_CONNECT_S, heartbeat=_HEARTBEAT_S)
                async with asyncio.timeout(_CONNECT_S):
                    await self._open(connection)
                logger.info("broker connected", extra={"queue": self._name})
                away = None
                began = time.monotonic()
                await self._lost.wait()
                pause_s = _RETRY_S[0] if time.monotonic() - began > _RETRY_S[1] else pause_s
            except Exception as error:
                if away != (away := one_line(error)):  # logged once rather than every few seconds
                    logger.warning("broker away", extra={"error": away, "retries_every_s": _RETRY_S[1]})
            finally:
                self._forget()
                if connection is not None:
                    await _closed(connection)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_S[1])

    async def _open(self, connection: AbstractConnection) -> None:
        self._lost.clear()
        connection.close_callbacks.add(self._on_lost)
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        channel.close_callbacks.add(self._on_lost)
        underlay = await channel.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(self._on_lost)  # somebody deleted the queue
        dead = f"{self._name}.dead"
        await channel.declare_queue(dead, durable=True)
        arguments: dict[str, Any] = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": dead}
        self._queue = await channel.declare_queue(self._name, durable=True, arguments=arguments)
        self._channel = channel
        await self._listen()

    def _on_lost(self, *_: Any) -> None:
        self._lost.set()

    def _give_up(self, what: str, error: Exception, channel: Any) -> None:
        """Connect anew, because a broker that did not answer once would keep every request waiting."""
        logger.warning(what, extra={"queue": self._name, "error": one_line(error)})
        if channel is self._channel:
            self._forget()
            self._lost.set()

    def _forget(self) -> None:
        # The broker delivers unacknowledged messages again, so they are not lost with the list.
        self._channel = self._queue = self._consuming = None
        self._held = []


async def _closed(connection: AbstractConnection) -> None:
    with suppress(Exception):
        async with asyncio.timeout(1):
            await connection.close()


def broker(options: config.Config) -> RabbitMQ | None:
    """Return the broker that a configuration names, not started; None if dispatchers only ask the store.

    Raises:
        ConfigError: no URL is given, or its package is not installed.
    """
    return RabbitMQ(options.queue_url, options.queue) if options.queue.transport == "rabbitmq" else None
