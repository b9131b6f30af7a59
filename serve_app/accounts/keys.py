"""API keys: who may do what and how much, and the GPU-seconds that each has used.

A key's text is `wan_<id>_<secret>`. The id finds its row; of the secret, 256 random bits, only the SHA-256 is stored,
which for that many bits needs neither salt nor stretching. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import Select, delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from serve_app.db.database import Database
from serve_app.db.tables import Job, Key, Usage
from serve_app.errors import ServeAppError

Scope = Literal["create", "read", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

DAY_S = 86400

_TEXT = re.compile(r"wan_([0-9a-f]{16})_([0-9a-f]{64})")


@dataclass(frozen=True)
class KeyLimits:
    """How much a key may have; None is no limit.

    `requests_per_minute` counts every call over HTTP; `queued_jobs` those that wait; `running_jobs` those that run,
    beyond which further ones wait; `gpu_seconds_per_day` is looked at when a job is created, over the last 24 hours.
    """

    requests_per_minute: int | None = None
    queued_jobs: int | None = None
    running_jobs: int | None = None
    gpu_seconds_per_day: float | None = None


class OverLimit(ServeAppError):
    """A key asks for more than it may have.

    Args:
        retry_after_s: when that may change, None if it is not known.
    """

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(code, message, retry_after_s)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class Keys:
    """The keys in the database of a `JobStore`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def create(self, name: str, scopes: Sequence[Scope], limits: KeyLimits | None = None) -> tuple[Key, str]:
        """A new key and its text, which nobody can be told again."""
        key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
        async with self._db.write() as session:
            key = Key(
                id=key_id,
                digest=_digest(secret),
                name=name,
                scopes=[scope for scope in SCOPES if scope in scopes],
                created_at=await self._db.clock(session),
                **vars(limits or KeyLimits()),
            )
            session.add(key)
        return key, f"wan_{key_id}_{secret}"

    async def find(self, text: str) -> Key | None:
        """The key of a text, None if there is none or it was revoked."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        async with self._db.read() as session:
            key = await session.get(Key, match[1])
        if key is None or not hmac.compare_digest(key.digest, _digest(match[2])) or key.revoked_at is not None:
            return None
        return key

    async def list(self) -> Sequence[tuple[Key, float]]:
        """All keys by age, those that were revoked too, each with the GPU-seconds of its last 24 hours."""
        async with self._db.read() as session:
            since = await self._db.clock(session) - DAY_S
            used = (
                select(func.coalesce(func.sum(Usage.gpu_seconds), 0.0))
                .where(Usage.owner == Key.id, Usage.at > since)
                .scalar_subquery()
            )
            rows = await session.execute(select(Key, used).order_by(Key.created_at, Key.id))
            return [(key, seconds) for key, seconds in rows]

    async def revoke(self, key_id: str) -> bool:
        """End a key at once; False if there is none. Its jobs stay, and run."""
        async with self._db.write() as session:
            key = await session.get(Key, key_id, with_for_update=True)
            if key is not None and key.revoked_at is None:
                key.revoked_at = await self._db.clock(session)
        return key is not None

    async def limit(self, key_id: str, changes: dict[str, float | None]) -> Key | None:
        """Change limits, named as in `KeyLimits`; None if there is no such key."""
        async with self._db.write() as session:
            key = await session.get(Key, key_id, with_for_update=True)
            if key is not None:
                for name, value in changes.items():
                    setattr(key, name, value)
        return key


async def admit(session: AsyncSession, owner: str, now: float) -> None:
    """Whether the owner may create a job now. Its row stays locked to the end of the transaction, so that the same
    key's creates come one after the other.

    Raises:
        OverLimit: it may not.
    """
    key = await session.get(Key, owner, with_for_update=True) if owner else None
    if key is None:
        return
    if key.queued_jobs is not None:
        waiting = select(func.count()).where(Job.owner == owner, Job.status == "queued")
        if (await session.scalar(waiting) or 0) >= key.queued_jobs:
            raise OverLimit("queued_jobs", f"{key.queued_jobs} jobs of this key wait already, its limit.")
    if key.gpu_seconds_per_day is not None:
        await session.execute(delete(Usage).where(Usage.owner == owner, Usage.at <= now - DAY_S))
        used = (await session.execute(select(Usage.at, Usage.gpu_seconds).where(Usage.owner == owner))).all()
        wait_s = _until_below(key.gpu_seconds_per_day, sorted((row.at, row.gpu_seconds) for row in used), now)
        if wait_s is not None:
            total = sum(row.gpu_seconds for row in used)
            message = f"This key used {total:.0f} GPU-seconds in 24 hours, its limit is {key.gpu_seconds_per_day:g}."
            raise OverLimit("gpu_seconds", message, wait_s)


def at_running_limit() -> Select[Any]:
    """The owners of whom as many jobs run as may. Looks at the rows of running jobs only."""
    running = aliased(Job)
    return (
        select(running.owner)
        .join(Key, Key.id == running.owner)
        .where(running.status == "in_progress", Key.running_jobs.is_not(None))
        .group_by(running.owner)
        .having(func.count() >= func.max(Key.running_jobs))
    )


def _until_below(limit: float, used: Sequence[tuple[float, float]], now: float) -> float | None:
    """Seconds until enough has gone out of the last 24 hours, None if it is below the limit now.

    Args:
        used: times and GPU-seconds, the oldest first.
    """
    left = sum(seconds for _, seconds in used)
    if left < limit:
        return None
    for at, seconds in used:
        left -= seconds
        if left < limit:
            return at + DAY_S - now
    return float(DAY_S)  # the limit is 0


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
