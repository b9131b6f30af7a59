"""The pipeline of a job: chosen at its first claim, by a hash of its owner, and kept for the job's life.

A canary gets the owners whose hash is below its share, so a larger share only adds owners. An owner keeps to one
version this way: the same seed may give other pixels in another. A remix follows its source. A job leaves its pipeline
only if that fails it, is aborted or cannot be reached, and then for the stable one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app.db.rollouts import ServedPipeline
from serve_app.db.tables import Job


@dataclass(frozen=True)
class Rollout:
    """The pipelines that share the jobs at a moment.

    Attributes:
        stable: gets every job that no canary gets; None while no pipeline has a row.
        canary: the pipeline on trial; None if there is none.
        others: those that were retired or aborted.
    """

    stable: ServedPipeline | None
    canary: ServedPipeline | None = None
    others: tuple[ServedPipeline, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[ServedPipeline]) -> Rollout:
        """Return the rollout that these rows describe."""
        by_state: dict[str, list[ServedPipeline]] = {}
        for row in rows:
            by_state.setdefault(row.state, []).append(row)
        stable, canary = (by_state.pop(state, [None])[0] for state in ("stable", "canary"))
        return cls(stable, canary, tuple(row for rest in by_state.values() for row in rest))

    @property
    def rows(self) -> Sequence[ServedPipeline]:
        """The pipelines, the stable one first."""
        return [row for row in (self.stable, self.canary, *self.others) if row is not None]

    def find(self, name: str | None) -> ServedPipeline | None:
        """Return the pipeline of this name; None if it has no row."""
        return next((row for row in self.rows if row.name == name), None)

    def on_trial(self, name: str | None) -> bool:
        """Return whether a failure of this pipeline is held against it, and not against the job."""
        row = self.find(name)
        return self.stable is not None and row is not None and row.state in ("canary", "aborted")


def share(canary: str, key: str) -> float:
    """Return the place of an owner, 0 to 100, that a canary's share has to exceed. Each canary shuffles the owners."""
    digest = hashlib.sha256(f"{canary}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 * 100


async def rollout(session: AsyncSession, *, lock: bool = False) -> Rollout:
    """Read the pipelines. With `lock` nobody else changes them during this transaction.

    Whoever locks these rows and rows of jobs locks these first.
    """
    query = select(ServedPipeline).order_by(ServedPipeline.name)
    return Rollout.of(await session.scalars(query.with_for_update() if lock else query))


async def assign(session: AsyncSession, job: Job, now: float) -> str | None:
    """Give a job that was just claimed its pipeline, if it has none that works.

    Args:
        session: the transaction of the claim.
        job: its row, locked.
        now: the database's time.

    Returns:
        The canary that the job was meant for while that waits for its first job; None otherwise.
    """
    served = await rollout(session)
    if served.stable is None:
        return None
    known = served.find(job.pipeline)
    if known is not None and known.state != "aborted":
        return _waiting(known) if known is served.canary else None
    if job.pipeline is not None or job.attempt > 1:  # it has begun elsewhere, so it is no canary's
        move(job, served)
        return None
    wanted = await _wanted(session, job, served)
    away = wanted is served.canary and wanted.away_until is not None and wanted.away_until > now
    job.pipeline = served.stable.name if away else wanted.name
    return _waiting(wanted) if wanted is served.canary else None


def move(job: Job, served: Rollout) -> None:
    """Give a job to the stable pipeline. Its saved states go on there only if both have the same revision."""
    assert served.stable is not None
    if job.pipeline == served.stable.name:
        return
    before = served.find(job.pipeline)
    known = before is None and job.pipeline is None  # from before there were several pipelines
    same = before is not None and before.revision is not None and before.revision == served.stable.revision
    job.pipeline = served.stable.name
    if not (known or same):
        job.states, job.resumed_step, job.saved_step = str(job.attempt), 0, 0


async def note_wanted(session: AsyncSession, name: str, now: float) -> None:
    """Note that a canary was given a job from now on, unless it is noted already."""
    waits = (ServedPipeline.name == name) & ServedPipeline.wanted_at.is_(None)
    await session.execute(update(ServedPipeline).where(waits).values(wanted_at=now))


def _waiting(canary: ServedPipeline) -> str | None:
    return canary.name if canary.wanted_at is None else None


async def _wanted(session: AsyncSession, job: Job, served: Rollout) -> ServedPipeline:
    """Return the pipeline that is to get a new job: that of its source, or that of its owner."""
    assert served.stable is not None
    source = None if job.remixed_from is None else await session.get(Job, job.remixed_from)
    if source is not None and source.pipeline is not None:
        theirs = served.find(source.pipeline)
        return served.canary if theirs is not None and theirs is served.canary else served.stable
    canary = served.canary
    if canary is not None and share(canary.name, job.owner or job.id) < canary.percent:
        return canary
    return served.stable
