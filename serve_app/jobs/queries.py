"""Read-only questions about jobs: one of them, a page of them, the place in the queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.db.tables import SHOWN_STATUS, Job, id_time
from serve_app.jobs.rows import Rows


class Queries(Rows):
    """The part of a `JobStore` that only reads."""

    async def get(self, video_id: str, owner: str | None = None) -> Job | None:
        """Return a job; None if there is none, or if it belongs to another owner than `owner` (None: any)."""
        if id_time(video_id) is None:
            return None
        async with self._db.read() as session:
            job = await session.get(Job, video_id)
        return job if job is not None and owner in (None, job.owner) else None

    async def list(
        self,
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
        owner: str | None = None,
        status: str | None = None,
    ) -> tuple[Sequence[Job], bool]:
        """Return a page of at most `limit` jobs by age, and whether more follow.

        Args:
            after: the last id of the page before; None for the first page.
            limit: most jobs of a page.
            order: "desc" for the newest first.
            owner: whose jobs; None for all.
            status: a `Job.shown_status`; None for all.

        Raises:
            LookupError: `after` is no id.
        """
        key = tuple_(Job.created_at, Job.id)
        query = select(Job).limit(limit + 1)
        if owner is not None:
            query = query.where(Job.owner == owner)
        if status is not None:
            query = query.where(SHOWN_STATUS.in_([status]))
        if order == "asc":
            query = query.order_by(Job.created_at, Job.id)
        else:
            query = query.order_by(Job.created_at.desc(), Job.id.desc())
        if after is not None:
            since = id_time(after)
            if since is None:
                raise LookupError(after)
            query = query.where(key > (since, after) if order == "asc" else key < (since, after))
        async with self._db.read() as session:
            jobs = (await session.scalars(query)).all()
        return jobs[:limit], len(jobs) > limit

    async def position(self, video_id: str) -> int | None:
        """Return the place in the queue, 1 being next; None if the job does not wait.

        Jobs that come later may still go first. Other owners' jobs are counted as if owners took turns from now on,
        however many jobs each has running.
        """
        if id_time(video_id) is None:
            return None
        async with self._db.read() as session:
            place = select(Job.owner, Job.effective_deadline).where(Job.id == video_id, Job.status == "queued")
            if (row := (await session.execute(place)).one_or_none()) is None:
                return None
            waits = select(func.count()).where(Job.status == "queued")
            before = waits.where(
                Job.owner == row.owner, tuple_(Job.effective_deadline, Job.id) < (row.effective_deadline, video_id)
            )
            own = (await session.scalar(before) or 0) + 1
            others = waits.where(or_(Job.owner < row.owner, Job.owner > row.owner)).group_by(Job.owner)
            return own + sum(min(count, own) for count in await session.scalars(others))

    async def _count_queued(self, session: AsyncSession) -> int:
        return await session.scalar(select(func.count()).where(Job.status == "queued")) or 0
