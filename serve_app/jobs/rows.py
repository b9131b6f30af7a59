"""What every part of the job store shares: finding a job's row and locking it, and how a transition is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import ColumnElement, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.config import RetentionConfig
from serve_app.db.database import Database
from serve_app.db.tables import Base, Job, id_time


class Rows:
    """The rows of one database.

    Args:
        late_outputs_s: how long a run that was cut off may still store something, in seconds.
        retention: of jobs that end here.
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
        """After a transition: the rows that it left behind, and when a job that has ended is forgotten."""
        session.add_all(rows)
        if job.finished:
            keep_s = self._retention.completed_s if job.status == "completed" else self._retention.failed_s
            job.expires_at = now + keep_s if keep_s else None


def held_by(held: Mapping[str, int]) -> ColumnElement[bool]:
    """The rows that these attempts (job id to attempt) still own."""
    return (Job.status == "in_progress") & tuple_(Job.id, Job.attempt).in_(list(held.items()))
