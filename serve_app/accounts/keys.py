"""API keys, their scopes and limits, and the GPU-seconds that each has used.

A key's text is `wan_<id>_<secret>`. The id finds its row. Of the secret, 256 random bits, only the SHA-256 is stored;
that many random bits need neither salt nor stretching. Knows nothing of HTTP.
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
    """The limits of a key; None is no limit.

    Attributes:
        requests_per_minute: calls over HTTP.
        queued_jobs: jobs that wait.
        running_jobs: jobs that run at once; further ones wait.
        gpu_seconds_per_day: GPU-seconds of the last 24 hours, checked when a job is created.
        queued_tflop: work of jobs that wait, in TFLOP. One job may always wait, however large it is.
    """

    requests_per_minute: int | None = None
    queued_jobs: int | None = None
    running_jobs: int | None = None
    gpu_seconds_per_day: float | None = None
    queued_tflop: float | None = None


class OverLimit(ServeAppError):
    """A key is at one of its limits.

    Args:
        code: the name of the limit.
        message: one sentence for the user.
        retry_after_s: seconds until that may change; None if not known.
    """

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(code, message, retry_after_s)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class Keys:
    """The API keys in a database."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def create(
        self,
        name: str,
        scopes: Sequence[Scope],
        limits: KeyLimits | None = None,
        degrade: dict[str, Any] | None = None,
    ) -> tuple[Key, str]:
        """Create a key. Return it with its text, which cannot be read again later.

        Args:
            name: whose it is.
            scopes: what it may be used for.
            limits: how much.
            degrade: what its requests agree to under load if they do not say, as in a request; None for nothing.
        """
        key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
        async with self._db.write() as session:
            key = Key(
                id=key_id,
                digest=_digest(secret),
                name=name,
                scopes=[scope for scope in SCOPES if scope in scopes],
                created_at=await self._db.clock(session),
                degrade=degrade,
                **vars(limits or KeyLimits()),
            )
            session.add(key)
        return key, f"wan_{key_id}_{secret}"

    async def find(self, text: str) -> Key | None:
        """Return the key of a text; None if there is none or it was revoked."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        async with self._db.read() as session:
            key = await session.get(Key, match[1])
        if key is None or not hmac.compare_digest(key.digest, _digest(match[2])) or key.revoked_at is not None:
            return None
        return key

    async def list(self) -> Sequence[tuple[Key, float]]:
        """Return all keys by age, revoked ones too, each with the GPU-seconds of its last 24 hours."""
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
        """Revoke a key at once; return False if there is none. Its jobs stay and still run."""
        async with self._db.write() as session:
            key = await session.get(Key, key_id, with_for_update=True)
            if key is not None and key.revoked_at is None:
                key.revoked_at = await self._db.clock(session)
        return key is not None

    async def limit(self, key_id: str, changes: dict[str, float | None]) -> Key | None:
        """Change limits, named as in `KeyLimits`; return the key, or None if there is none."""
        async with self._db.write() as session:
            key = await session.get(Key, key_id, with_for_update=True)
            if key is not None:
                for name, value in changes.items():
                    setattr(key, name, value)
        return key


async def check_quota(session: AsyncSession, owner: str, now: float, work: float = 0.0) -> Key | None:
    """Check that the owner may create a job now; return their key, if they have one.

    The key's row stays locked to the end of the transaction, so that jobs of one key are created one after the other.

    Args:
        session: a transaction.
        owner: id of the key.
        now: the database's time.
        work: TFLOP of the job.

    Raises:
        OverLimit: the key is at its `queued_jobs`, `queued_tflop` or `gpu_seconds_per_day`.
    """
    key = await session.get(Key, owner, with_for_update=True) if owner else None
    if key is None:
        return None
    if key.queued_jobs is not None:
        waiting = select(func.count()).where(Job.owner == owner, Job.status == "queued")
        if (await session.scalar(waiting) or 0) >= key.queued_jobs:
            raise OverLimit("queued_jobs", f"{key.queued_jobs} jobs of this key wait already, its limit.")
    if key.queued_tflop is not None:
        work_waiting = select(func.sum(Job.work)).where(Job.owner == owner, Job.status == "queued")
        queued = await session.scalar(work_waiting) or 0.0
        if queued and queued + work > key.queued_tflop:
            limit = f"the limit is {key.queued_tflop:g}"
            message = f"{queued:.0f} TFLOP of this key wait, and this video has {work:.0f}: {limit}."
            raise OverLimit("queued_tflop", message)
    if key.gpu_seconds_per_day is not None:
        await session.execute(delete(Usage).where(Usage.owner == owner, Usage.at <= now - DAY_S))
        used = (await session.execute(select(Usage.at, Usage.gpu_seconds).where(Usage.owner == owner))).all()
        wait_s = _until_below(key.gpu_seconds_per_day, sorted((row.at, row.gpu_seconds) for row in used), now)
        if wait_s is not None:
            total = sum(row.gpu_seconds for row in used)
            message = f"This key used {total:.0f} GPU-seconds in 24 hours, its limit is {key.gpu_seconds_per_day:g}."
            raise OverLimit("gpu_seconds", message, wait_s)
    return key


def at_running_limit() -> Select[Any]:
    """Select the owners at their limit of running jobs. Reads the rows of running jobs only."""
    running = aliased(Job)
    return (
        select(running.owner)
        .join(Key, Key.id == running.owner)
        .where(running.status == "in_progress", Key.running_jobs.is_not(None))
        .group_by(running.owner)
        .having(func.count() >= func.max(Key.running_jobs))
    )


def _until_below(limit: float, used: Sequence[tuple[float, float]], now: float) -> float | None:
    """Return the seconds until the usage of the last 24 hours falls below a limit; None if it is below now.

    Args:
        limit: GPU-seconds.
        used: times and GPU-seconds, the oldest first.
        now: the database's time.
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
