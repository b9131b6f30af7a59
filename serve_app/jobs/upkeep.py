"""Upkeep of the whole store by dispatchers, in small batches.

It covers deadlines that passed, leases that ran out, announcements that were lost, expired jobs and garbage.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select, update

from serve_app import config
from serve_app.db.tables import Garbage, Job
from serve_app.errors import JobFailed
from serve_app.jobs import transitions
from serve_app.jobs.order import due
from serve_app.jobs.rows import Rows, after_commit
from serve_app.metrics import catalog as metrics

# Rows that one call handles, so that no transaction stays open for long.
_BATCH = 100


class Upkeep(Rows):
    """The part of a `JobStore` that no request waits for. Any number of dispatchers may call it at the same time."""

    async def sweep(self, options: config.DispatcherConfig, *, reap: bool = True) -> None:
        """Fail waiting jobs whose deadline passed, and put jobs whose lease ran out back into the queue.

        Args:
            options: how often a job is tried.
            reap: False leaves the leases alone.
        """
        async with self._db.write() as session:
            now = await self._db.clock(session)
            overdue = select(Job).where(Job.status == "queued", Job.deadline_at <= now).limit(_BATCH)
            for job in await session.scalars(overdue.with_for_update(skip_locked=True)):
                message = "Its deadline passed while it waited."
                garbage = transitions.fail(job, now, "deadline_exceeded", message, self._late_outputs_s)
                self._settle(session, job, now, garbage)
            if not reap:
                return
            expired = select(Job).where(Job.status == "in_progress", Job.lease_until < now).limit(_BATCH)
            silence = JobFailed("lease_expired", "The dispatcher of this video fell silent.", retryable=True)
            for job in await session.scalars(expired.with_for_update(skip_locked=True)):
                garbage = transitions.attempt_failed(job, now, silence, 0, options, self._late_outputs_s)
                self._settle(session, job, now, garbage)
                after_commit(session, lambda: metrics.attempts_failed.inc(reason=silence.code))

    async def to_announce(self, again_s: float | None) -> Sequence[str]:
        """Return the ids of waiting jobs to announce to dispatchers. They count as announced from now on.

        Args:
            again_s: announce again the jobs that were announced longer ago than this, in seconds; None for none.
        """
        async with self._db.write() as session:
            now = await self._db.clock(session)
            announced_before = 0.0 if again_s is None else now - again_s
            batch = (
                select(Job.id)
                .where(due(now), Job.announced_at <= announced_before)
                .order_by(Job.announced_at)
                .limit(_BATCH)
                .with_for_update(skip_locked=True)
            )
            # The condition is repeated so that, of two callers at once, the second finds nothing left to announce.
            ids = await session.scalars(
                update(Job)
                .where(Job.id.in_(batch), Job.status == "queued", Job.announced_at <= announced_before)
                .values(announced_at=now)
                .returning(Job.id)
                .execution_options(synchronize_session=False)
            )
            return ids.all()

    async def expire(self) -> int:
        """Delete jobs that have expired and have their files removed; return how many."""
        async with self._db.write() as session:
            now = await self._db.clock(session)
            expired = select(Job).where(Job.expires_at <= now).order_by(Job.expires_at).limit(_BATCH)
            jobs = (await session.scalars(expired.with_for_update(skip_locked=True))).all()
            for job in jobs:
                session.add_all(transitions.forget(job, now, self._late_outputs_s))
                await session.delete(job)
        return len(jobs)

    async def garbage(self, limit: int = 20) -> Sequence[Garbage]:
        """Return storage folders that are due to be removed."""
        async with self._db.read() as session:
            now = await self._db.clock(session)
            query = select(Garbage).where(Garbage.due_at <= now).order_by(Garbage.due_at).limit(limit)
            return (await session.scalars(query)).all()

    async def forget_garbage(self, items: Sequence[Garbage]) -> None:
        """Delete the rows of folders that have been removed."""
        async with self._db.write() as session:
            await session.execute(delete(Garbage).where(Garbage.id.in_([item.id for item in items])))
