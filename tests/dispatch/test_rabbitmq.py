"""Jobs that are announced over a real RabbitMQ, and what happens to them when it fails."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aio_pika
import pytest
from sqlalchemy import update

from serve_app import config
from serve_app.db.tables import Job
from serve_app.dispatch.dispatcher import Dispatcher
from serve_app.dispatch.rabbitmq import RabbitMQ
from serve_app.dispatch.run import Runner
from serve_app.errors import ConfigError, JobFailed
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from tests.support.brokers import PORT, SERVER, connected, via
from tests.support.fakes import PARAMS, FakePipeline, until
from tests.support.links import LinkTo
from tests.support.running import OPTIONS, create, ended

Listen = Callable[..., Awaitable[Dispatcher]]


@pytest.fixture
async def brokers() -> AsyncIterator[list[RabbitMQ]]:
    """Closed after the test."""
    brokers: list[RabbitMQ] = []
    yield brokers
    for broker in brokers:
        await broker.close()


@pytest.fixture
async def listen(
    store: JobStore, storage: Storage, queue_options: config.QueueConfig, brokers: list[RabbitMQ]
) -> AsyncIterator[Listen]:
    """Start dispatchers that hear of jobs by the broker, and look at the store at most once in `poll_s`."""
    started: list[Dispatcher] = []

    async def begin(
        run: Runner, url: str = SERVER, poll_s: float = 30, wait: bool = True, **options: Any
    ) -> Dispatcher:
        broker = RabbitMQ(url, queue_options.model_copy(update={"poll_s": poll_s}))
        brokers.append(broker)
        if wait:
            await connected(broker)
        else:
            broker.start()
        dispatcher = Dispatcher(store, storage, run, OPTIONS.model_copy(update=options), broker)
        dispatcher.start()
        started.append(dispatcher)

        async def looked() -> bool:
            return dispatcher._looked_at > float("-inf")

        await until(looked)  # what follows has to be announced
        return dispatcher

    yield begin
    for dispatcher in started:
        await dispatcher.stop()


@pytest.fixture
async def announcing(store: JobStore, queue_options: config.QueueConfig, brokers: list[RabbitMQ]) -> RabbitMQ:
    """The gateway's end of the queue: jobs that are created in `store` are announced."""
    broker = RabbitMQ(SERVER, queue_options)
    brokers.append(broker)
    store._announcer = await connected(broker)
    return broker


async def messages(name: str) -> int | None:
    """Return the number of messages in a queue; None if there is no such queue."""
    connection = await aio_pika.connect(SERVER)
    async with connection:
        channel = await connection.channel()
        try:
            queue = await channel.declare_queue(name, passive=True)
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return None
        return queue.declaration_result.message_count


async def empty(name: str) -> bool:
    return await messages(name) == 0


async def test_a_message_brings_the_job_to_the_dispatcher(
    store: JobStore, storage: Storage, listen: Listen, announcing: RabbitMQ, queue_options: config.QueueConfig
) -> None:
    pipeline = FakePipeline(storage)
    await listen(pipeline)
    ids = [await create(store) for _ in range(10)]
    for video_id in ids:
        assert (await ended(store, video_id, "completed")).attempt == 1
    assert sorted(job.id for job in pipeline.jobs) == sorted(ids)
    await until(lambda: empty(queue_options.name))


async def test_without_a_message_it_is_not_looked_for(store: JobStore, storage: Storage, listen: Listen) -> None:
    """Else the tests here would show nothing."""
    await listen(FakePipeline(storage))
    video_id = await create(store)
    await asyncio.sleep(0.5)
    job = await store.get(video_id)
    assert job is not None and job.status == "queued"


async def test_the_store_decides_who_is_next(
    store: JobStore, storage: Storage, listen: Listen, announcing: RabbitMQ, queue_options: config.QueueConfig
) -> None:
    gate = asyncio.Event()
    pipeline = FakePipeline(storage, gate=gate)
    await listen(pipeline, running_jobs=1)
    busy = await create(store)

    async def begun() -> bool:
        return bool(pipeline.jobs)

    await until(begun)
    ids = [await create(store, priority=priority) for priority in ("batch", "standard", "interactive")]

    async def handed_back() -> bool:
        # Whoever has no room keeps no message from others.
        return await messages(queue_options.name) == 3

    await until(handed_back)
    gate.set()
    for video_id in ids:
        await ended(store, video_id, "completed")
    assert [job.id for job in pipeline.jobs] == [busy, *ids[::-1]]


async def test_two_dispatchers_share(store: JobStore, storage: Storage, listen: Listen, announcing: RabbitMQ) -> None:
    first, second = FakePipeline(storage, step_s=0.01), FakePipeline(storage, step_s=0.01)
    await listen(first, running_jobs=2)
    await listen(second, running_jobs=2)
    ids = [await create(store) for _ in range(20)]
    for video_id in ids:
        assert (await ended(store, video_id, "completed")).attempt == 1
    assert sorted(job.id for job in first.jobs + second.jobs) == sorted(ids)
    assert first.jobs and second.jobs


async def test_a_job_that_failed_or_is_to_start_later_is_announced_when_it_is_due(
    store: JobStore, storage: Storage, listen: Listen, announcing: RabbitMQ
) -> None:
    lost = JobFailed("rank_lost", "A rank was lost.", retryable=True)
    await listen(FakePipeline(storage, errors=[lost, lost]), retry_s=0.3)
    assert (await ended(store, await create(store), "completed")).attempt == 3
    async with store._db.read() as session:
        now = await store._db.clock(session)
    job = await ended(store, await create(store, start_at=now + 0.5), "completed")
    assert job.started_at is not None and job.started_at >= now + 0.5


async def test_what_cannot_be_read_is_put_aside(
    store: JobStore, storage: Storage, listen: Listen, announcing: RabbitMQ, queue_options: config.QueueConfig
) -> None:
    await listen(FakePipeline(storage))
    connection = await aio_pika.connect(SERVER)
    async with connection:
        channel = await connection.channel()
        for body in (b"\xff\xfe", b"video_1", b""):
            await channel.default_exchange.publish(aio_pika.Message(body), queue_options.name)

    async def put_aside() -> bool:
        return await messages(f"{queue_options.name}.dead") == 3 and await messages(queue_options.name) == 0

    await until(put_aside)
    await ended(store, await create(store), "completed")


async def test_messages_of_jobs_that_are_gone_do_no_harm(
    store: JobStore, storage: Storage, listen: Listen, announcing: RabbitMQ, queue_options: config.QueueConfig
) -> None:
    video_id = await create(store)
    await store.request_cancel(video_id)
    await announcing.announce([video_id, video_id])
    pipeline = FakePipeline(storage)
    await listen(pipeline)
    await until(lambda: empty(queue_options.name))
    assert pipeline.jobs == []


@pytest.mark.parametrize("how", ["purged", "deleted"])
async def test_a_wiped_broker_loses_no_job(
    store: JobStore, storage: Storage, listen: Listen, announcing: RabbitMQ, queue_options: config.QueueConfig, how: str
) -> None:
    gate = asyncio.Event()
    await listen(FakePipeline(storage, gate=gate), running_jobs=1, poll_s=0.3)
    ids = [await create(store) for _ in range(4)]
    connection = await aio_pika.connect(SERVER)
    async with connection:
        channel = await connection.channel()
        if how == "purged":
            await (await channel.get_queue(queue_options.name)).purge()
        else:
            await channel.queue_delete(queue_options.name)
    gate.set()
    for video_id in [*ids, await create(store)]:
        await ended(store, video_id, "completed")

    async def there_again() -> bool:
        return await messages(queue_options.name) == 0 and announcing.connected

    await until(there_again)
    await ended(store, await create(store), "completed")


async def test_lost_announcements_are_made_again_once(store: JobStore) -> None:
    ids = {await create(store) for _ in range(3)}
    await create(store, start_at=4e9)
    assert await store.to_announce(None) == []
    assert await store.to_announce(60) == []
    async with store._db.write() as session:
        await session.execute(update(Job).where(Job.announced_at > 0).values(announced_at=Job.announced_at - 100))
    found = await asyncio.gather(*(store.to_announce(60) for _ in range(2)))
    assert sorted(video_id for some in found for video_id in some) == sorted(ids)


async def test_broker_away_at_the_start(store: JobStore, storage: Storage, listen: Listen, link_to: LinkTo) -> None:
    link = await link_to(PORT)
    await link.cut()
    dispatcher = await listen(FakePipeline(storage), url=via(link), wait=False)
    store._announcer = dispatcher._broker
    await ended(store, await create(store), "completed")  # asked for at the usual pace meanwhile
    await link.join()

    async def connected() -> bool:
        return dispatcher._broker is not None and dispatcher._broker.connected

    await until(connected)
    await ended(store, await create(store), "completed")


async def test_broker_away_for_a_while(store: JobStore, storage: Storage, listen: Listen, link_to: LinkTo) -> None:
    gate = asyncio.Event()
    link = await link_to(PORT)
    dispatcher = await listen(FakePipeline(storage, gate=gate), url=via(link))
    broker = dispatcher._broker
    assert isinstance(broker, RabbitMQ)
    store._announcer = broker
    running = await create(store)
    for _ in range(2):
        await link.cut()
        ids = [await create(store) for _ in range(3)]

        async def noticed(broker: RabbitMQ = broker) -> bool:
            return not broker.connected

        await until(noticed)
        gate.set()
        for video_id in [running, *ids]:
            assert (await ended(store, video_id, "completed")).attempt == 1
        await link.join()

        async def back(broker: RabbitMQ = broker) -> bool:
            return broker.connected

        await until(back)
        await ended(store, await create(store), "completed")


async def test_a_broker_that_hangs_fails_no_request(
    store: JobStore, storage: Storage, queue_options: config.QueueConfig, link_to: LinkTo, brokers: list[RabbitMQ]
) -> None:
    link = await link_to(PORT)
    broker = RabbitMQ(via(link), queue_options.model_copy(update={"publish_timeout_s": 0.3}))
    brokers.append(broker)
    store._announcer = await connected(broker)
    link.stall()
    assert await store.get((await store.create(PARAMS, "wan")).id) is not None
    assert not broker.connected  # the next request does not wait for it
    link.flow()

    async def back() -> bool:
        return await broker.announce([])

    await until(back)


async def test_package_or_url_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("", "http://user:secret@host"):
        with pytest.raises(ConfigError, match=r"^queue\.url has .*, expected amqp://") as error:
            _ = config.Config(queue=config.QueueConfig(transport="rabbitmq", url=url)).queue_url
        assert "secret" not in str(error.value)
    monkeypatch.setenv("WAN_SERVE_QUEUE_URL", "amqp://broker")
    assert config.Config(queue=config.QueueConfig(transport="rabbitmq")).queue_url == "amqp://broker"
    monkeypatch.setitem(sys.modules, "aio_pika", None)
    with pytest.raises(ConfigError, match="'rabbitmq': needs the package 'aio_pika'"):
        RabbitMQ("amqp://broker", config.QueueConfig())


async def test_a_broker_that_is_away_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tries, often = 0, asyncio.Event()

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        writer.close()
        tries += 1
        if tries == 4:
            often.set()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        rabbit = RabbitMQ(f"amqp://me:secret@127.0.0.1:{port}/", config.QueueConfig(transport="rabbitmq"))
        with caplog.at_level("INFO", logger="serve_app"):
            rabbit.start()
            await asyncio.wait_for(often.wait(), 30)
            await rabbit.close()
    assert [record.message for record in caplog.records] == ["broker away"]
    assert "secret" not in caplog.text
