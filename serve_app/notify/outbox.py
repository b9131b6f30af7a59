"""The outbox, from which notifiers distribute events, claim deliveries, record their tries and delete old ones.

Any number of notifiers share one outbox. A delivery is sent at least once: if a notifier dies between sending and
recording, it is sent again with the same id. All times are by the database's clock.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, exists, select, update

from serve_app.db.database import Database
from serve_app.db.notifications import LOGGED_TRIES, Delivery, Endpoint, Event, new_delivery
from serve_app.db.tables import Job
from serve_app.notify.outcome import Outcome

# Rows that one transaction handles, so that none stays open for long.
_BATCH = 100
_JITTER = 0.1


@dataclass(frozen=True)
class DueDelivery:
    """A claimed delivery with everything needed to send it. `endpoint` or `job` is None once deleted."""

    delivery: Delivery
    event: Event
    endpoint: Endpoint | None
    job: Job | None


class Outbox:
    """The events and deliveries in a database.

    Args:
        database: a started database.
        retries_s: seconds to wait before each try of a delivery.
    """

    def __init__(self, database: Database, retries_s: Sequence[float]) -> None:
        self._db = database
        self._retries_s = tuple(retries_s)

    @property
    def most_tries(self) -> int:
        """The number of tries after which a delivery has failed."""
        return len(self._retries_s)

    async def distribute(self) -> int:
        """Make the deliveries of the oldest events that have none yet; return how many events those were."""
        undistributed = select(Event).where(Event.distributed.is_(False)).order_by(Event.id).limit(_BATCH)
        async with self._db.read() as session:  # a look costs SQLite's only writer nothing
            if await session.scalar(select(undistributed.exists())) is not True:
                return 0
        async with self._db.write() as session:
            events = (await session.scalars(undistributed.with_for_update(skip_locked=True))).all()
            owners = {event.owner for event in events}
            enabled = select(Endpoint).where(Endpoint.owner.in_(owners), Endpoint.disabled_reason.is_(None))
            endpoints = (await session.scalars(enabled)).all()
            jobs = select(Job.id, Job.notify_email).where(Job.id.in_([event.video_id for event in events]))
            recipients = {row.id: row.notify_email for row in await session.execute(jobs)}
            now = await self._db.clock(session)
            for event in events:
                due_at = now + self._wait_s(0)
                for endpoint in endpoints:
                    if endpoint.owner == event.owner and event.type in endpoint.event_types:
                        session.add(new_delivery(event, due_at, endpoint_id=endpoint.id))
                if recipient := recipients.get(event.video_id):
                    session.add(new_delivery(event, due_at, recipient=recipient))
                event.distributed = True
        return len(events)

    async def claim(self, lease_s: float, busy: Collection[str] = ()) -> DueDelivery | None:
        """Claim the delivery that has been due for longest; None if none is due.

        Args:
            lease_s: seconds within which the caller sends it and records the try.
            busy: ids of endpoints (empty for mails) whose deliveries have to wait.
        """
        due = select(Delivery.id).where(Delivery.status == "pending", Delivery.endpoint_id.not_in(busy))
        async with self._db.read() as session:
            now = await self._db.clock(session)
            if await session.scalar(due.where(Delivery.due_at <= now).limit(1)) is None:
                return None
        async with self._db.write() as session:
            now = await self._db.clock(session)
            next_id = (
                due.where(Delivery.due_at <= now)
                .order_by(Delivery.due_at, Delivery.id)
                .limit(1)
                .with_for_update(skip_locked=True)
                .scalar_subquery()
            )
            claimed = await session.scalars(
                update(Delivery)
                .where(Delivery.id == next_id, Delivery.status == "pending")
                .values(due_at=now + lease_s, claims=Delivery.claims + 1, tries=Delivery.tries + 1)
                .returning(Delivery)
                .execution_options(synchronize_session=False, populate_existing=True)
            )
            delivery = claimed.one_or_none()
            if delivery is None:
                return None
            event = await session.get(Event, delivery.event_id)
            if event is None:  # it was deleted just when somebody replayed it
                await session.delete(delivery)
                return None
            endpoint = await session.get(Endpoint, delivery.endpoint_id) if delivery.endpoint_id else None
            job = None if delivery.endpoint_id else await session.get(Job, event.video_id)
            return DueDelivery(delivery, event, endpoint, job)

    async def record(self, delivery: Delivery, outcome: Outcome) -> None:
        """Record a try and plan the next one. Has no effect if the delivery was claimed again since."""
        async with self._db.write() as session:
            mine = (Delivery.id == delivery.id) & (Delivery.claims == delivery.claims) & (Delivery.status == "pending")
            row = await session.scalar(select(Delivery).where(mine).with_for_update())
            if row is None:
                return
            now = await self._db.clock(session)
            row.log = [*row.log, outcome.entry(now)][-LOGGED_TRIES:]
            if outcome.delivered:
                row.status = "delivered"
            elif outcome.final or row.tries >= self.most_tries:
                row.status = "failed"
            else:
                row.due_at = now + self._wait_s(row.tries)
            if outcome.disable:
                await session.execute(
                    update(Endpoint)
                    .where(Endpoint.id == row.endpoint_id)
                    .values(disabled_reason=outcome.disable, updated_at=now)
                )

    async def forget(self, retention_s: float) -> int:
        """Delete finished events and deliveries older than `retention_s` seconds; return how many rows those were."""
        async with self._db.write() as session:
            before = await self._db.clock(session) - retention_s
            ended = select(Delivery.id).where(Delivery.created_at < before, Delivery.status != "pending")
            oldest = delete(Delivery).where(Delivery.id.in_(ended.limit(_BATCH))).returning(Delivery.id)
            deliveries = len((await session.scalars(oldest)).all())
        # In a transaction of its own, because a replay locks events before deliveries.
        async with self._db.write() as session:
            told = Event.distributed & ~exists().where(Delivery.event_id == Event.id)
            done = select(Event.id).where(Event.created_at < before, told).limit(_BATCH)
            events = await session.scalars(delete(Event).where(Event.id.in_(done)).returning(Event.id))
            return deliveries + len(events.all())

    def _wait_s(self, tries: int) -> float:
        """Return the seconds before the try that follows `tries`, with jitter so that joint failures spread out."""
        return self._retries_s[tries] * random.uniform(1 - _JITTER, 1 + _JITTER)
