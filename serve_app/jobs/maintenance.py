"""What an operator switches for all dispatchers at once. Kept in the store, so it holds for those that start later."""

from __future__ import annotations

from sqlalchemy import delete, func, select

from serve_app.db.tables import SHOWN_STATUS, Job, MaintenanceFlag
from serve_app.jobs.order import PAUSED
from serve_app.jobs.rows import Rows


class Maintenance(Rows):
    """The operator's part of a `JobStore`."""

    async def pause(self) -> bool:
        """Begin no more jobs; those that run go on. Whether that was not so before."""
        async with self._db.write() as session:
            if await session.get(MaintenanceFlag, PAUSED) is not None:
                return False
            session.add(MaintenanceFlag(name=PAUSED, since=await self._db.clock(session)))
        return True

    async def resume(self) -> bool:
        """Begin jobs again; whether they were paused."""
        async with self._db.write() as session:
            gone = await session.scalars(
                delete(MaintenanceFlag).where(MaintenanceFlag.name == PAUSED).returning(MaintenanceFlag.name)
            )
            return gone.one_or_none() is not None

    async def paused_since(self) -> float | None:
        """When jobs were paused, in seconds since the epoch; None if they are not."""
        async with self._db.read() as session:
            switch = await session.get(MaintenanceFlag, PAUSED)
            return None if switch is None else switch.since

    async def running(self) -> int:
        """How many jobs somebody works on."""
        async with self._db.read() as session:
            now = await self._db.clock(session)
            held = select(func.count()).where(Job.status == "in_progress", Job.lease_until >= now)
            return await session.scalar(held) or 0

    async def counts(self) -> dict[str, int]:
        """Count the jobs of each `Job.shown_status`."""
        async with self._db.read() as session:
            rows = await session.execute(select(SHOWN_STATUS.label("shown"), func.count()).group_by("shown"))
            return {status: count for status, count in rows}
