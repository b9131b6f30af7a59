"""Webhook endpoints for users: create and change them, list their deliveries, and have events sent again.

`owner` is the key whose endpoints are meant; None means every key's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.db.database import Database
from serve_app.db.notifications import Delivery, Endpoint, Event, is_id, new_delivery, new_id
from serve_app.errors import ServeAppError
from serve_app.notify.outcome import Outcome
from serve_app.notify.webhook import new_secret

OLD_SECRET_S = 24 * 3600
# Most secrets that sign besides the newest one: each makes the header longer.
_OLD_SECRETS = 4
# Most events that one call replays, so that its transaction stays short.
REPLAY = 500

Row = tuple[Delivery, Event]


class TooManyEndpoints(ServeAppError):
    """The owner has as many endpoints as allowed."""


class Endpoints:
    """The webhook endpoints in a database."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def create(self, owner: str, name: str, url: str, event_types: Sequence[str], most: int) -> Endpoint:
        """Create an endpoint with a secret of its own.

        Raises:
            TooManyEndpoints: the owner has `most` already.
        """
        endpoint_id, created_at = new_id("we")
        endpoint = Endpoint(
            id=endpoint_id,
            owner=owner,
            name=name,
            url=url,
            event_types=[*event_types],
            secret=new_secret(),
            old_secrets=[],
            created_at=created_at,
            updated_at=created_at,
            disabled_reason=None,
        )
        async with self._db.write() as session:
            count = select(func.count()).where(Endpoint.owner == owner)
            if (await session.scalar(count) or 0) >= most:
                raise TooManyEndpoints(f"There are {most} webhook endpoints already, which is the most.")
            session.add(endpoint)
        return endpoint

    async def get(self, endpoint_id: str, owner: str | None) -> Endpoint | None:
        """Return an endpoint, or None if there is none."""
        if not is_id(endpoint_id):
            return None
        async with self._db.read() as session:
            found: Endpoint | None = await session.scalar(_one(endpoint_id, owner))
            return found

    async def list(self, owner: str | None, after: str | None, limit: int) -> tuple[Sequence[Endpoint], bool]:
        """Return a page of at most `limit` endpoints, the newest first, and whether more follow.

        Raises:
            LookupError: `after` is no id.
        """
        query = select(Endpoint).order_by(Endpoint.id.desc()).limit(limit + 1)
        if owner is not None:
            query = query.where(Endpoint.owner == owner)
        if after is not None:
            query = query.where(Endpoint.id < _checked(after))
        async with self._db.read() as session:
            found = (await session.scalars(query)).all()
        return found[:limit], len(found) > limit

    async def update(self, endpoint_id: str, owner: str | None, changes: dict[str, Any]) -> Endpoint | None:
        """Change columns; return the endpoint, or None if there is none."""
        async with self._db.write() as session:
            endpoint = await self._locked(session, endpoint_id, owner)
            if endpoint is not None and any(getattr(endpoint, name) != value for name, value in changes.items()):
                for name, value in changes.items():
                    setattr(endpoint, name, value)
                endpoint.updated_at = await self._db.clock(session)
        return endpoint

    async def rotate(self, endpoint_id: str, owner: str | None, *, keep_old: bool) -> Endpoint | None:
        """Make a new secret. With `keep_old` the secret before also signs for another `OLD_SECRET_S`."""
        async with self._db.write() as session:
            endpoint = await self._locked(session, endpoint_id, owner)
            if endpoint is not None:
                now = await self._db.clock(session)
                valid = [old for old in endpoint.old_secrets if now < old["until"]]
                newest = {"secret": endpoint.secret, "until": now + OLD_SECRET_S}
                endpoint.old_secrets = [newest, *valid][:_OLD_SECRETS] if keep_old else []
                endpoint.secret = new_secret()
                endpoint.updated_at = now
        return endpoint

    async def delete(self, endpoint_id: str, owner: str | None) -> bool:
        """Delete an endpoint with all of its deliveries; return False if there is none."""
        if await self.get(endpoint_id, owner) is None:
            return False
        async with self._db.write() as session:
            # Deliveries go first: recording a try locks rows in the same order.
            await session.execute(delete(Delivery).where(Delivery.endpoint_id == endpoint_id))
            gone = await session.scalars(delete(Endpoint).where(Endpoint.id == endpoint_id).returning(Endpoint.id))
            return gone.one_or_none() is not None

    async def deliveries(self, endpoint_id: str, after: str | None, limit: int) -> tuple[Sequence[Row], bool]:
        """Return a page of the endpoint's deliveries with their events, the newest first, and whether more follow.

        Raises:
            LookupError: `after` is no id.
        """
        query = (
            select(Delivery, Event)
            .join(Event, Event.id == Delivery.event_id)
            .where(Delivery.endpoint_id == endpoint_id)
            .order_by(Delivery.id.desc())
            .limit(limit + 1)
        )
        if after is not None:
            query = query.where(Delivery.id < _checked(after))
        async with self._db.read() as session:
            found = [(row[0], row[1]) for row in await session.execute(query)]
        return found[:limit], len(found) > limit

    async def log(self, endpoint: Endpoint, event: Event, outcome: Outcome) -> None:
        """Record a try that was made outside of the outbox, with its event, which is not in the database yet."""
        async with self._db.write() as session:
            now = await self._db.clock(session)
            delivery = new_delivery(event, now, endpoint_id=endpoint.id)
            delivery.status = "delivered" if outcome.delivered else "failed"
            delivery.claims = delivery.tries = 1
            delivery.log = [outcome.entry(now)]
            session.add_all([event, delivery])

    async def replay(self, endpoint: Endpoint, *, event_id: str = "", since: float = 0) -> tuple[int, bool] | None:
        """Have one event of the endpoint's owner (`event_id`) or all undelivered ones (`since`) delivered again.

        Args:
            endpoint: the receiver.
            event_id: an event, whether or not it arrived before.
            since: without `event_id`, seconds since the epoch: events from then on that the endpoint subscribed to and
                that neither arrived nor are pending; at most `REPLAY` of them, the oldest first.

        Returns:
            How many are sent, and whether there are more. None if there is no such event (any more).
        """
        query = select(Event).where(Event.owner == endpoint.owner, Event.distributed)
        if event_id:
            query = query.where(Event.id == event_id)
        else:
            arrived = select(Delivery.event_id).where(
                Delivery.endpoint_id == endpoint.id, Delivery.status.in_(["delivered", "pending"])
            )
            query = query.where(
                Event.created_at >= since, Event.type.in_(endpoint.event_types), Event.id.not_in(arrived)
            )
        if event_id and not is_id(event_id):
            return None
        async with self._db.write() as session:
            # Locked, so that two replays of an event do not both find that it has no delivery yet.
            found = await session.scalars(query.order_by(Event.id).limit(REPLAY + 1).with_for_update())
            events = found.all()
            if event_id and not events:
                return None
            now = await self._db.clock(session)
            chosen = events[:REPLAY]
            mine = (Delivery.endpoint_id == endpoint.id) & Delivery.event_id.in_([event.id for event in chosen])
            earlier = await session.scalars(select(Delivery).where(mine).with_for_update())
            deliveries = {delivery.event_id: delivery for delivery in earlier}
            for event in chosen:
                delivery = deliveries.get(event.id)
                if delivery is None:
                    session.add(new_delivery(event, now, endpoint_id=endpoint.id))
                else:
                    # A try that is under way no longer counts.
                    delivery.status, delivery.due_at, delivery.tries = "pending", now, 0
                    delivery.claims += 1
        return len(chosen), len(events) > REPLAY

    async def _locked(self, session: AsyncSession, endpoint_id: str, owner: str | None) -> Endpoint | None:
        if not is_id(endpoint_id):
            return None
        found: Endpoint | None = await session.scalar(_one(endpoint_id, owner).with_for_update())
        return found


def _one(endpoint_id: str, owner: str | None) -> Select[Any]:
    query = select(Endpoint).where(Endpoint.id == endpoint_id)
    return query if owner is None else query.where(Endpoint.owner == owner)


def _checked(after: str) -> str:
    if not is_id(after):
        raise LookupError(after)
    return after
