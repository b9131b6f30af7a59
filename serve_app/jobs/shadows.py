"""Shadows: copies of completed jobs for a canary to make, which nobody is told of or charged."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from serve_app.db.rollouts import Shadow, ShadowOutcome
from serve_app.db.tables import Garbage, Job
from serve_app.jobs.assignment import note_wanted, rollout
from serve_app.jobs.order import due, not_paused
from serve_app.jobs.rows import Rows

# Seconds after which the files of a copy are removed whose dispatcher died, and after which its row is.
_FILES_S = 6 * 3600.0
_ROWS_S = 7 * 86400.0


def shadow_prefix(video_id: str) -> str:
    """Return the storage folder of a copy's files."""
    return f"shadow/{video_id}"


class Shadows(Rows):
    """The part of a `JobStore` about copies of jobs."""

    async def begin_shadow(self) -> tuple[Job, str] | None:
        """Return the job that the canary copies next, and the canary's name; None if there is none or a job waits."""
        async with self._db.read() as session:
            now = await self._db.clock(session)
            if await session.scalar(select(Job.id).where(due(now)).limit(1)) is not None:
                return None
            served = await rollout(session)
            canary = served.canary
            if canary is None or served.stable is None or (canary.away_until or 0.0) > now:
                return None
            known = select(Shadow.job_id).where(Shadow.pipeline == canary.name, Shadow.job_id == Job.id)
            theirs = (Job.pipeline == served.stable.name) | Job.pipeline.is_(None)
            job = await session.scalar(
                select(Job)
                .where(Job.status == "completed", Job.completed_at >= canary.since, theirs)
                .where(~known.exists(), Job.resumed_step == 0, not_paused())
                .order_by(Job.completed_at.desc())
                .limit(1)
            )
            if job is None:
                return None
        try:
            async with self._db.write() as session:
                session.add(Shadow(job_id=job.id, pipeline=canary.name, at=now, outcome="running"))
                session.add(Garbage(prefix=shadow_prefix(job.id), due_at=now + _FILES_S))
                await session.execute(delete(Shadow).where(Shadow.at < now - _ROWS_S))
        except IntegrityError:  # another dispatcher has just begun the same
            return None
        return job, canary.name

    async def end_shadow(
        self,
        video_id: str,
        pipeline: str,
        outcome: ShadowOutcome,
        error: str | None = None,
        seconds: float | None = None,
        source_seconds: float | None = None,
    ) -> None:
        """Record what became of a copy."""
        async with self._db.write() as session:
            row = await session.get(Shadow, (video_id, pipeline))
            if row is not None:
                row.at, row.outcome, row.error = await self._db.clock(session), outcome, error
                row.seconds, row.source_seconds = seconds, source_seconds

    async def drop_shadow(self, video_id: str, pipeline: str, *, away: bool) -> None:
        """Forget a copy that was cut off; `away` says that the canary could not be reached."""
        async with self._db.write() as session:
            await session.execute(delete(Shadow).where(Shadow.job_id == video_id, Shadow.pipeline == pipeline))
            if away:
                await note_wanted(session, pipeline, await self._db.clock(session))
