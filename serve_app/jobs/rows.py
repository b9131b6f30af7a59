"""The base of every part of the job store: find and lock a job's row, and store a transition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from sqlalchemy import ColumnElement, event, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.config import RetentionConfig
from serve_app.db.database import Database
from serve_app.db.tables import Base, Job, id_time
from serve_app.metrics import catalog as metrics


class Rows:
    """The rows of one database.

    Args:
        late_outputs_s: seconds in which a run that was cut off may still store something.
        retention: how long jobs that end here are kept.
    """

    def __init__(self, database: Database, late_outputs_s: float, retention: RetentionConfig) -> None:
        self._db = database
        self._late_outputs_s = late_outputs_s
        self._retention = retention

    async def _locked(self, session: AsyncSession, video_id: str, attempt: int | None = None) -> Job | None:
        if id_time(video_id) is None:
            return None
        query = select(Job).where(Job.id == video_id)
        if attempt is not None:
            query = query.where(held_by({video_id: attempt}))
        return await session.scalar(query.with_for_update())

    def _settle(self, session: AsyncSession, job: Job, now: float, rows: Iterable[Base]) -> None:
        """Store the rows that a transition returned, and set when a job that has ended expires."""
        session.add_all(rows)
        if job.finished:
            keep_s = self._retention.completed_s if job.status == "completed" else self._retention.failed_s
            job.expires_at = now + keep_s if keep_s else None
            count_end(session, job.error_code or metrics.COMPLETED, job.priority)


def count_end(session: AsyncSession, reason: str, priority: str) -> None:
    """Count a job that ends for good once its transaction is committed; a write that is tried again counts once."""
    after_commit(session, lambda: metrics.jobs_ended.inc(reason=reason, priority=priority))


def after_commit(session: AsyncSession, call: Callable[[], None]) -> None:
    """Call something once the transaction of a session is committed, and never if it is rolled back."""
    event.listen(session.sync_session, "after_commit", lambda _: call(), once=True)


def held_by(held: Mapping[str, int]) -> ColumnElement[bool]:
    """Return the condition that a job is still held by one of these attempts (job id to attempt)."""
    return (Job.status == "in_progress") & tuple_(Job.id, Job.attempt).in_(list(held.items()))
