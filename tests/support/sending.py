"""Notifiers on a store, and questions that their tests ask of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import select

from serve_app.config import Config, validate
from serve_app.db.notifications import EVENT_TYPES, Delivery, Endpoint, Event
from serve_app.events import Done
from serve_app.jobs.store import JobStore
from serve_app.notify.endpoints import Endpoints
from serve_app.notify.notifier import Notifier
from tests.support.fakes import PARAMS, until
from tests.support.receiver import Receiver

DONE = Done({"video": "videos/x/1/video.mp4"}, {"denoise": 1.5}, 123)
Notify = Callable[..., Notifier]


def options(**webhooks: Any) -> Config:
    """Allow plain HTTP to loopback, and a schedule of three tries without waits."""
    mail = webhooks.pop("mail", None)
    given = {
        "allow_http": True,
        "allow_networks": ["127.0.0.0/8"],
        "retries_s": [0, 0, 0],
        "timeout_s": 5,
        **webhooks,
    }
    return validate({"dispatcher": {"poll_s": 0.02}, "webhooks": given, "mail": mail})


@pytest.fixture
async def notify(store: JobStore) -> AsyncIterator[Notify]:
    """Start notifiers, and stop them after the test."""
    started: list[Notifier] = []

    def begin(**webhooks: Any) -> Notifier:
        notifier = Notifier(store.database, options(**webhooks))
        notifier.start()
        started.append(notifier)
        return notifier

    yield begin
    for notifier in started:
        notifier.raise_if_ended()
        await notifier.stop()


@pytest.fixture
def endpoints(store: JobStore) -> Endpoints:
    return Endpoints(store.database)


async def listen(endpoints: Endpoints, receiver: Receiver, owner: str = "", *kinds: str) -> Endpoint:
    return await endpoints.create(owner, "mine", receiver.url, kinds or EVENT_TYPES, 20)


async def completed(store: JobStore, *, owner: str = "", notify_email: str | None = None, prompt: str = "a cat") -> str:
    """Make a job that has just completed; return its id."""
    params = PARAMS.model_copy(update={"prompt": prompt})
    job = await store.create(params, "wan", notify_email=notify_email)
    await own(store, job.id, owner)
    claimed = await store.claim("me", 60)
    assert claimed is not None and claimed.id == job.id
    assert await store.complete(job.id, 1, DONE)
    return job.id


async def failed(store: JobStore, *, owner: str = "", notify_email: str | None = None, prompt: str = "a cat") -> str:
    """Make a job that was cancelled while it waited; return its id."""
    job = await store.create(PARAMS.model_copy(update={"prompt": prompt}), "wan", notify_email=notify_email)
    await own(store, job.id, owner)
    assert await store.request_cancel(job.id) is not None
    return job.id


async def own(store: JobStore, video_id: str, owner: str) -> None:
    async with store.database.write() as session:
        job = await store._locked(session, video_id)
        assert job is not None
        job.owner = owner


async def deliveries(store: JobStore) -> list[Delivery]:
    async with store.database.read() as session:
        return [*(await session.scalars(select(Delivery).order_by(Delivery.id)))]


async def events(store: JobStore) -> list[Event]:
    async with store.database.read() as session:
        return [*(await session.scalars(select(Event).order_by(Event.id)))]


async def ended(store: JobStore, count: int = 1) -> list[Delivery]:
    """Wait until there are `count` deliveries and none is pending; return them."""

    async def look() -> list[Delivery] | None:
        found = await deliveries(store)
        return found if len(found) == count and all(row.status != "pending" for row in found) else None

    return list(await until(look))
