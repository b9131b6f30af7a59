"""The dispatchers' half of the job store: lease jobs, report on them, and end them. The database's clock judges leases.

Every write of a run names its attempt and returns whether it took effect. If it did not, the run has been superseded,
cancelled or deleted, and should end.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from sqlalchemy import case, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from serve_app import config
from serve_app.accounts.keys import at_running_limit
from serve_app.db.database import STORE_AWAY
from serve_app.db.tables import Job
from serve_app.errors import JobFailed
from serve_app.events import Done, Progress
from serve_app.jobs import transitions
from serve_app.jobs.assignment import Rollout, assign, note_wanted, rollout
from serve_app.jobs.degrading import Degrading
from serve_app.jobs.evidence import NOT_ITS_FAULT
from serve_app.jobs.generations import may_lease
from serve_app.jobs.order import due, next_job, not_paused
from serve_app.jobs.rows import held_by
from serve_app.metrics import catalog as metrics

# Percent at which each stage begins and ends. Denoising takes nearly all of the time on every model and device.
_SPANS = {"encode": (0, 2), "denoise": (2, 92), "decode": (92, 97), "finish": (97, 99)}
# Interruptions of a job that a canary is not blamed for.
_INTERRUPTIONS_OF_CANARY = 2
# Tries of one claim. Each that fails means that another dispatcher has just got a job; the next poll finds the rest.
_CLAIM_TRIES = 3


def percent(progress: Progress) -> int:
    """Return the progress over all stages, 0 to 99."""
    low, high = _SPANS[progress.stage]
    return int(low + (high - low) * min(progress.step / max(progress.steps, 1), 1))


class Leases(Degrading):
    """The dispatchers' half of a `JobStore`."""

    async def claim(self, owner: str, lease_s: float, generation: str = "") -> Job | None:
        """Lease the next job by the rule of `serve_app.jobs.order`; None if no job is due or jobs are paused.

        A job can be overtaken, among those of its owner, only by one of a more urgent class that came at most the
        difference of their ageing times after it. Once it has waited its own ageing time, nothing that came later goes
        first. Within a class the order is first come, first served.

        Jobs of a key at its `running_jobs` limit are passed over. Dispatchers that claim at the same moment may exceed
        that limit by one each.

        Args:
            owner: the dispatcher that claims.
            lease_s: seconds after which another may take the job over.
            generation: the dispatcher's generation. If it has one that is not current, it gets no job.
        """
        for _ in range(_CLAIM_TRIES):
            # Most looks find nothing, and should then neither write nor compare owners.
            async with self._db.read() as session:
                now = await self._db.clock(session)
                may_begin = (due(now), not_paused(), may_lease(generation), Job.owner.not_in(at_running_limit()))
                if await session.scalar(select(Job.id).where(*may_begin).limit(1)) is None:
                    return None
            async with self._db.write() as session:
                now = await self._db.clock(session)
                claimed = await session.scalars(
                    update(Job)
                    .where(Job.id == next_job(now).scalar_subquery(), Job.status == "queued", may_lease(generation))
                    .values(
                        status="in_progress",
                        attempt=Job.attempt + 1,
                        started_at=now,
                        lease_owner=owner,
                        lease_until=now + lease_s,
                    )
                    .returning(Job)
                    .execution_options(synchronize_session=False, populate_existing=True)
                )
                job = claimed.one_or_none()
                waiting = None if job is None else await assign(session, job, now)
                if job is not None:
                    await self._reduce(session, job)
            if waiting is not None:
                # In a transaction of its own: this one has locked a job, and those of pipelines are locked first.
                with suppress(*STORE_AWAY):
                    async with self._db.write() as session:
                        await note_wanted(session, waiting, now)
            if job is not None:
                if job.attempt == 1:
                    metrics.job_wait_seconds.observe(now - job.waits_since, priority=job.priority)
                return job
            # Other dispatchers hold all due jobs of the owner who was next, so another owner is next now.
        return None

    async def renew(self, held: Mapping[str, int], lease_s: float) -> dict[str, bool]:
        """Extend the leases on `held` (job id to attempt). Return the ids still held, each with `cancel_requested`."""
        if not held:
            return {}
        async with self._db.write() as session:
            now = await self._db.clock(session)
            rows = await session.execute(
                update(Job)
                .where(held_by(held))
                .values(lease_until=now + lease_s)
                .returning(Job.id, Job.cancel_requested)
                .execution_options(synchronize_session=False)
            )
            return {row.id: row.cancel_requested for row in rows}

    async def still_held(self, held: Mapping[str, int]) -> dict[str, bool]:
        """Return which of `held` are still held, each with `cancel_requested`: `renew` without writing."""
        if not held:
            return {}
        async with self._db.read() as session:
            rows = await session.execute(select(Job.id, Job.cancel_requested).where(held_by(held)))
            return {row.id: row.cancel_requested for row in rows}

    async def progress(self, video_id: str, attempt: int, progress: Progress, resumed_step: int = 0) -> bool:
        """Record a step.

        Args:
            video_id: the job.
            attempt: the attempt that reports.
            progress: the step.
            resumed_step: the denoising step at which the attempt began. If it is beyond those of all attempts before,
                their failures are forgiven. It is recorded while the attempt runs, because the dispatcher may die
                before the attempt ends.
        """
        reached = percent(progress)
        began = self._db.now() if progress.stage == "denoise" else None
        further = Job.resumed_step < resumed_step
        saved = progress.saved_step if progress.stage == "denoise" else 0
        async with self._db.write() as session:
            written = await session.execute(
                update(Job)
                .where(held_by({video_id: attempt}))
                .values(
                    stage=progress.stage,
                    step=progress.step,
                    steps=progress.steps,
                    seconds_left=progress.seconds_left,
                    denoise_at=func.coalesce(Job.denoise_at, began),
                    progress=case((Job.progress < reached, reached), else_=Job.progress),
                    resumed_step=case((further, resumed_step), else_=Job.resumed_step),
                    saved_step=case((Job.saved_step < saved, saved), else_=Job.saved_step),
                    failures=case((further, 0), else_=Job.failures),
                )
                .returning(Job.id)
                .execution_options(synchronize_session=False)
            )
            return written.one_or_none() is not None

    async def complete(self, video_id: str, attempt: int, done: Done) -> bool:
        """Record the video. Files of earlier attempts and saved states are removed."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            now = await self._db.clock(session)
            self._settle(session, job, now, transitions.complete(job, now, done, self._late_outputs_s))
        return True

    async def fail(self, video_id: str, attempt: int, code: str, message: str) -> bool:
        """Record that there will be no video."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            now = await self._db.clock(session)
            error = JobFailed(code, message)
            if (served := await _fault_of_canary(session, job, error)) is not None:
                self._settle(session, job, now, transitions.failed_on_canary(job, now, error, served))
            else:
                self._settle(session, job, now, transitions.fail(job, now, code, message, self._late_outputs_s))
        return True

    async def retry(
        self, video_id: str, attempt: int, error: JobFailed, options: config.DispatcherConfig, resumed_step: int = 0
    ) -> bool:
        """Record that an attempt that began at `resumed_step` failed.

        `transitions.attempt_failed` decides whether and when the job is tried again.
        """
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            now = await self._db.clock(session)
            if (served := await _fault_of_canary(session, job, error)) is not None:
                rows = transitions.failed_on_canary(job, now, error, served)
            else:
                rows = transitions.attempt_failed(job, now, error, resumed_step, options, self._late_outputs_s)
            self._settle(session, job, now, rows)
        return True

    async def release(self, video_id: str, attempt: int, *, delay_s: float = 0) -> bool:
        """Hand a job back to the queue, where it keeps its place. No failure is counted."""
        async with self._db.write() as session:
            job = await self._locked(session, video_id, attempt)
            if job is None:
                return False
            now = await self._db.clock(session)
            self._settle(session, job, now, transitions.requeue(job, now, delay_s, self._late_outputs_s))
        return True


async def _fault_of_canary(session: AsyncSession, job: Job, error: JobFailed) -> Rollout | None:
    """Return the pipelines if this failure is held against a canary, which loses the job; None if the job keeps it."""
    if job.pipeline is None or job.cancel_requested or error.code in NOT_ITS_FAULT:
        return None
    if transitions.is_interruption(error) and job.interruptions < _INTERRUPTIONS_OF_CANARY:
        return None  # a host may have been lost
    served = await rollout(session)
    return served if served.on_trial(job.pipeline) else None
