"""The level of load that all dispatchers share, and what is made of a job at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.config import Priority
from serve_app.db.tables import DegradeState, Job
from serve_app.degrade import MAX_LEVEL, Amount, Floor, Level, reduced, steer
from serve_app.errors import ConfigError
from serve_app.jobs.backlog import pressure, read_backlog
from serve_app.jobs.outlook import Outlook

_ROW = "queue"
AUTO, OFF = "auto", "off"
MODES = (AUTO, OFF, *(str(level) for level in range(MAX_LEVEL + 1)))


@dataclass(frozen=True)
class Steering:
    """The options of `Degrading.steer`.

    Attributes:
        target_wait_s: seconds within which the jobs of each class should begin.
        most_groups: largest number of groups that autoscaling may start.
        start_s: seconds in which another group can be there.
    """

    target_wait_s: Mapping[str, float]
    most_groups: int
    start_s: float


class Degrading(Outlook):
    """The part of a `JobStore` that offers less under load, to those who allow it."""

    async def set_degrade(self, mode: str) -> None:
        """Set how the level is found: `auto`, `off`, or a level that holds until this is called again.

        Raises:
            ConfigError: it is none of these.
        """
        if mode not in MODES:
            raise ConfigError(f"MODE has value {mode!r}, expected one of {', '.join(MODES)}")
        async with self._db.write() as session:
            row = await self._degrade_row(session)
            row.mode = mode

    async def degrade_level(self) -> tuple[str, int]:
        """Return how the level is found, and the level that holds."""
        async with self._db.read() as session:
            row = await session.get(DegradeState, _ROW)
            return (AUTO, 0) if row is None else (row.mode, _level(row))

    async def steer(self, options: Steering) -> int:
        """Look at the queue and change the level if it is time; return the level that holds.

        Any number of dispatchers may call it: what counts is the time, not how often it is called.
        """
        await self.pace()  # it counts the replicas, too
        groups = self._fleet.groups or 0
        async with self._db.read() as session:
            backlog = await read_backlog(session, await self._db.clock(session))
        wait = pressure(backlog, groups, options.target_wait_s)
        async with self._db.write() as session:
            row = await self._degrade_row(session)
            now = await self._db.clock(session)
            # As long as a group would be there in time, that is better than less.
            late = wait is not None and wait > 1 + options.start_s / min(options.target_wait_s.values())
            before = Level(row.level, row.changed_at, row.over_since, row.under_since)
            after = steer(before, wait, groups >= options.most_groups or late, now)
            for name, value in vars(after).items():
                setattr(row, name, value)
            return _level(row)

    async def _reduce(self, session: AsyncSession, job: Job) -> None:
        """Reduce a job that has just been claimed for the first time, if it allows that and the load asks for it."""
        if job.degrade is None or job.attempt > 1:
            return
        row = await session.get(DegradeState, _ROW)
        level = 0 if row is None else _level(row)
        asked = Amount(job.params["width"], job.params["height"], job.params["num_inference_steps"])
        made = reduced(asked, Floor.parse(job.degrade), level, cast(Priority, job.priority))
        if made == asked:
            return
        job.requested = {name: job.params[name] for name in ("width", "height", "num_inference_steps")}
        job.params = {**job.params, "width": made.width, "height": made.height, "num_inference_steps": made.steps}
        job.work = self._work(job.params)
        job.warnings = [*job.warnings, _warning(asked, made)]

    def _work(self, params: dict[str, Any]) -> float | None:
        """Return the TFLOP of a video; None if not known."""
        raise NotImplementedError

    async def _degrade_row(self, session: AsyncSession) -> DegradeState:
        row = await session.get(DegradeState, _ROW, with_for_update=True)
        if row is None:
            row = DegradeState(name=_ROW, mode=AUTO, level=0, changed_at=0.0)
            session.add(row)
        return row


def _level(row: DegradeState) -> int:
    if row.mode == AUTO:
        return row.level
    return 0 if row.mode == OFF else int(row.mode)


def _warning(asked: Amount, made: Amount) -> str:
    parts = []
    if (made.width, made.height) != (asked.width, asked.height):
        parts.append(f"{made.width}x{made.height} instead of {asked.width}x{asked.height}")
    if made.steps != asked.steps:
        parts.append(f"{made.steps} steps instead of {asked.steps}")
    return f"The queue was long, so the video was made with {' and '.join(parts)}, as its request allows."
