"""Maintenance flags that an operator sets for all dispatchers, those that start later too, and counts of jobs."""

from __future__ import annotations

from sqlalchemy import delete, func, select

from serve_app.db.tables import SHOWN_STATUS, Job, MaintenanceFlag
from serve_app.jobs.order import PAUSED
from serve_app.jobs.rows import Rows


class Maintenance(Rows):
    """The operator's part of a `JobStore`."""

    async def pause(self) -> bool:
        """Begin no more jobs; running ones go on. Return False if jobs were paused before."""
        async with self._db.write() as session:
            if await session.get(MaintenanceFlag, PAUSED) is not None:
                return False
            session.add(MaintenanceFlag(name=PAUSED, since=await self._db.clock(session)))
        return True

    async def resume(self) -> bool:
        """Begin jobs again. Return whether they were paused."""
        async with self._db.write() as session:
            gone = await session.scalars(
                delete(MaintenanceFlag).where(MaintenanceFlag.name == PAUSED).returning(MaintenanceFlag.name)
            )
            return gone.one_or_none() is not None

    async def paused_since(self) -> float | None:
        """Return the time since which jobs are paused, in seconds since the epoch; None if they are not."""
        async with self._db.read() as session:
            flag = await session.get(MaintenanceFlag, PAUSED)
            return None if flag is None else flag.since

    async def running(self) -> int:
        """Count the jobs that a dispatcher works on now."""
        async with self._db.read() as session:
            now = await self._db.clock(session)
            held = select(func.count()).where(Job.status == "in_progress", Job.lease_until >= now)
            return await session.scalar(held) or 0

    async def counts(self) -> dict[str, int]:
        """Count the jobs of each `Job.shown_status`."""
        async with self._db.read() as session:
            rows = await session.execute(select(SHOWN_STATUS.label("shown"), func.count()).group_by("shown"))
            return {status: count for status, count in rows}
