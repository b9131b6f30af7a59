"""Generations of dispatchers on one store, such as the old and the new cluster of an upgrade. The current one leases.

The first generation that comes is current. A newer one waits until its pipeline runs, and takes over then; the one
before is retired and does not come back by itself, unless the current one has fallen silent.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, exists, select, true
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.db.rollouts import Generation
from serve_app.errors import ServeAppError
from serve_app.jobs.rows import Rows

SILENT_S = 120.0
"""Seconds without a sign of the current generation after which any other may take over."""
# Seconds after which the row of a generation that is not current is removed.
_FORGOTTEN_S = 7 * 86400.0


def may_lease(generation: str) -> ColumnElement[bool]:
    """Return the condition that a dispatcher of this generation may lease jobs. One without a name always may."""
    if not generation:
        return true()
    return exists(select(Generation.name).where(Generation.name == generation, Generation.state == "current"))


class Generations(Rows):
    """The part of a `JobStore` about generations."""

    async def generations(self) -> list[tuple[Generation, float]]:
        """Return the generations, the current one first, each with the seconds since it was last seen."""
        async with self._db.read() as session:
            now = await self._db.clock(session)
            rows = (await session.scalars(select(Generation).order_by(Generation.since.desc()))).all()
            return [(row, now - row.seen_at) for row in sorted(rows, key=lambda row: row.state != "current")]

    async def is_current(self, name: str) -> bool:
        """Return whether dispatchers of this generation may lease jobs."""
        async with self._db.read() as session:
            return bool(await session.scalar(select(may_lease(name))))

    async def report_generation(self, name: str, ready: bool) -> bool:
        """Say that a dispatcher of a generation is there, and have it take over if it is its turn.

        Args:
            name: the generation.
            ready: whether its pipeline runs.

        Returns:
            Whether it is the current one now.
        """
        if (current := await self._report(name, ready)) is None:
            # Its row is there now. Only rows can be locked, so two new generations could not tell who was first.
            current = await self._report(name, ready)
        return bool(current)

    async def _report(self, name: str, ready: bool) -> bool | None:
        async with self._db.write() as session:
            rows, now = await _all(session), await self._db.clock(session)
            mine, current = rows.get(name), next((row for row in rows.values() if row.state == "current"), None)
            if mine is None:
                session.add(Generation(name=name, state="waiting", since=now, seen_at=now))
                return None
            mine.seen_at = now
            silent = current is not None and now - current.seen_at > SILENT_S
            if current is None or (mine is not current and ready and (mine.state == "waiting" or silent)):
                _switch(mine, current, now)
            for row in rows.values():
                if row.state != "current" and now - row.seen_at > _FORGOTTEN_S:
                    await session.delete(row)
            return mine.state == "current"

    async def switch_generation(self, name: str) -> str | None:
        """Make a generation the current one. Return the name of the one before; None if there was none or the same.

        Raises:
            ServeAppError: no dispatcher of this generation was ever there.
        """
        async with self._db.write() as session:
            rows, now = await _all(session), await self._db.clock(session)
            if name not in rows:
                known = ", ".join(map(repr, sorted(rows))) or "a generation, and none has come yet"
                raise ServeAppError(f"NAME has value {name!r}, expected one of {known}")
            current = next((row for row in rows.values() if row.state == "current"), None)
            if rows[name] is current:
                return None
            _switch(rows[name], current, now)
            return None if current is None else current.name


async def _all(session: AsyncSession) -> dict[str, Generation]:
    rows = await session.scalars(select(Generation).order_by(Generation.name).with_for_update())
    return {row.name: row for row in rows}


def _switch(to: Generation, current: Generation | None, now: float) -> None:
    if current is not None:
        current.state, current.since = "retired", now
    to.state, to.since = "current", now
