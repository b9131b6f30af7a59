"""The tables of notifications, the same on SQLite and PostgreSQL. Times are seconds since the epoch.

An event is written in the transaction that ends its job. Distributing it makes one delivery for each endpoint that
subscribed to its type, and one for the mail that the job asked for.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any, Literal, get_args

from sqlalchemy import JSON, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from serve_app.db.tables import Base, Job

EventType = Literal["video.completed", "video.failed", "canary.aborted", "canary.promoted"]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
DeliveryStatus = Literal["pending", "delivered", "failed"]

_ID = re.compile(r"(?:we|evt|dlv)_[0-9a-f]{38}")
# The latest tries that a delivery's log keeps.
LOGGED_TRIES = 20


def new_id(kind: Literal["we", "evt", "dlv"]) -> tuple[str, float]:
    """Return a fresh id and its time. Ids of a kind sort by time, and 96 random bits keep them from being guessed."""
    microseconds = time.time_ns() // 1000
    return f"{kind}_{microseconds:014x}{secrets.token_hex(12)}", microseconds / 1e6


def is_id(text: str) -> bool:
    """Return whether a text has the form of an id of these tables."""
    return _ID.fullmatch(text) is not None


class Endpoint(Base):
    """A webhook URL that gets the events of its owner's videos.

    Secrets are stored in plain text: signing needs them, unlike checking a password.
    """

    __tablename__ = "webhook_endpoints"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64), default="", index=True)
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]]
    secret: Mapped[str]
    """The newest secret: `whsec_` and padded base64."""
    old_secrets: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    """Earlier secrets, each with `secret` and `until`, the time up to which it signs as well."""
    created_at: Mapped[float]
    updated_at: Mapped[float]
    disabled_reason: Mapped[str | None]
    """The reason why nothing is sent; None while the endpoint is enabled."""


class Event(Base):
    """Something that happened to a video, or to a canary: then `video_id` is the name of its pipeline."""

    __tablename__ = "events"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    type: Mapped[str] = mapped_column(String(32))
    video_id: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float]
    distributed: Mapped[bool] = mapped_column(default=False)

    __table_args__ = (
        Index("events_by_distribution", "distributed", "id"),
        Index("events_by_owner", "owner", "created_at"),
        Index("events_by_age", "created_at"),
    )


class Delivery(Base):
    """An event on its way to one receiver.

    `due_at` is the time of the next try. A notifier claims the delivery by moving `due_at` beyond the time that a try
    can take, which is its lease: after a crash the delivery is due again. `claims` counts the claims, and a result is
    recorded only under the latest one; `tries` counts since the delivery began or was replayed, for the schedule.
    """

    __tablename__ = "deliveries"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    event_id: Mapped[str] = mapped_column(String(64))
    endpoint_id: Mapped[str] = mapped_column(String(64), default="")
    """The endpoint that gets it; empty for a mail."""
    recipient: Mapped[str] = mapped_column(default="")
    """The address of a mail; empty for an endpoint."""
    status: Mapped[str] = mapped_column(String(16), default="pending")
    created_at: Mapped[float]
    due_at: Mapped[float]
    claims: Mapped[int] = mapped_column(default=0)
    tries: Mapped[int] = mapped_column(default=0)
    log: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    """The latest tries, each an `Outcome.entry`."""

    __table_args__ = (
        UniqueConstraint("event_id", "endpoint_id"),
        Index("deliveries_by_time", "status", "due_at"),
        Index("deliveries_by_endpoint", "endpoint_id", "id"),
        Index("deliveries_by_age", "created_at"),
    )


def event_of(job: Job) -> Event:
    """Return the event of a job that has just completed or failed."""
    return new_event(job.owner, "video.completed" if job.status == "completed" else "video.failed", job.id)


def new_event(owner: str, kind: EventType, video_id: str, *, distributed: bool = False) -> Event:
    """Return an event that happens now."""
    event_id, created_at = new_id("evt")
    return Event(id=event_id, owner=owner, type=kind, video_id=video_id, created_at=created_at, distributed=distributed)


def new_delivery(event: Event, now: float, *, endpoint_id: str = "", recipient: str = "") -> Delivery:
    """Return a delivery that is due at `now`."""
    delivery_id, _ = new_id("dlv")
    return Delivery(
        id=delivery_id,
        event_id=event.id,
        endpoint_id=endpoint_id,
        recipient=recipient,
        status="pending",
        created_at=now,
        due_at=now,
        claims=0,
        tries=0,
        log=[],
    )
