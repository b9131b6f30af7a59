"""How a job's row changes when an attempt ends: tried again, failed or completed; which files are garbage then, and
what its key is charged.

Rules only: the caller holds the row's lock, and stores the rows that they return in the same transaction: the garbage,
what is charged, and the event of a job that has ended, so that nothing ends without being told. Times are seconds since
the epoch by the database's clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from serve_app import config
from serve_app.db.notifications import event_of
from serve_app.db.tables import CANCELLED, Base, Garbage, Job, Usage
from serve_app.errors import JobFailed
from serve_app.events import Done

# A longer wait between two attempts helps nobody: what takes minutes to come back keeps no job from waiting.
_LONGEST_DELAY_S = 60
# Error codes of what is lost around a job: its group outside of its steps, a process that drove it, its dispatcher, the
# storage.
_INTERRUPTIONS = {"group_lost", "worker_lost", "lease_expired", "store_failed"}
# Error codes of ends that the owner chose: the GPUs' time is charged to the key all the same.
_CHOSEN = {CANCELLED, "deadline_exceeded"}


def complete(job: Job, now: float, done: Done, late_outputs_s: float) -> list[Base]:
    """The video is there. Files of earlier attempts and saved states have served."""
    job.status = "completed"
    job.completed_at = now
    job.progress = 100
    job.step, job.seconds_left = job.steps, None
    job.outputs, job.timings = dict(done.outputs), dict(done.timings)
    job.warnings = [*job.warnings, *done.warnings]
    job.size_bytes, job.revision = done.size_bytes, done.revision
    job.lease_owner = job.lease_until = None
    job.error_code = job.error_message = None
    earlier = [f"videos/{job.id}/{attempt}" for attempt in range(1, job.attempt)]
    return [
        event_of(job),
        *_garbage([*earlier, job.state_prefix], now, late_outputs_s),
        *_charge(job, now, done.timings.get("denoise", 0.0)),
    ]


def fail(job: Job, now: float, code: str, message: str, late_outputs_s: float) -> list[Base]:
    """There will be no video."""
    charge = _charge(job, now, _denoised_s(job, now)) if code in _CHOSEN else []
    job.status = "failed"
    job.completed_at = now
    job.error_code, job.error_message = code, message
    job.lease_owner = job.lease_until = job.seconds_left = None
    prefixes = [f"videos/{job.id}", job.state_prefix] if job.attempt else []
    return [event_of(job), *_garbage(prefixes, now, late_outputs_s), *charge]


def forget(job: Job, now: float, late_outputs_s: float) -> list[Base]:
    """The row is about to be deleted."""
    prefixes = [f"videos/{job.id}"]
    if job.attempt and not job.finished:
        prefixes.append(job.state_prefix)
    late = job.attempt and (job.status != "completed" or job.attempt > 1)
    charge = [] if job.finished else _charge(job, now, _denoised_s(job, now))
    return [*_garbage(prefixes, now, late_outputs_s if late else 0), *charge]


def requeue(job: Job, now: float, delay_s: float, late_outputs_s: float) -> list[Base]:
    """Back to its place in the queue, unless somebody wanted it cancelled. Saved states stay for the next attempt."""
    if job.cancel_requested:
        return fail(job, now, CANCELLED, "Cancelled while it ran.", late_outputs_s)
    job.status = "queued"
    job.not_before = now + delay_s
    job.announced_at = 0.0
    job.lease_owner = job.lease_until = job.started_at = job.denoise_at = job.stage = job.seconds_left = None
    job.step = job.steps = job.progress = 0
    return []


def attempt_failed(
    job: Job, now: float, error: JobFailed, resumed_step: int, options: config.DispatcherConfig, late_outputs_s: float
) -> list[Base]:
    """An attempt that began at `resumed_step` ended with a retryable error: again, later, or never.

    A job that only waited, or was driven, where something was lost is no reason for it: that is an interruption, of
    which a job may have many. The same step that loses its group again and again is taken for the job's doing; other
    failures count while attempts in a row begin no further than the one before.
    """
    if resumed_step > job.resumed_step:
        job.resumed_step, job.failures = resumed_step, 0
    if error.code in _INTERRUPTIONS and error.step is None:
        job.interruptions += 1
        if job.interruptions >= options.max_interruptions:
            message = f"{error.message} Gave up after {job.interruptions} interruptions."
            return fail(job, now, error.code, message, late_outputs_s)
        # At once, unless the last attempt was cut short just now: then what is missing is not back yet.
        lasted_s = now - (job.started_at or now)
        job.error_code, job.error_message = error.code, error.message
        return requeue(job, now, 0 if lasted_s >= options.retry_s else options.retry_s, late_outputs_s)
    job.failures += 1
    if error.step is not None:
        job.losses = job.losses + 1 if error.step == job.lost_step else 1
        job.lost_step = error.step
        if job.losses >= options.group_losses:
            times = "once" if job.losses == 1 else f"{job.losses} times"
            message = f"The workers were lost {times} during step {job.lost_step} of this video; it is not tried again."
            return fail(job, now, "poisonous", message, late_outputs_s)
    if job.failures >= options.max_attempts:
        tries = "1 attempt" if job.failures == 1 else f"{job.failures} attempts in a row"
        return fail(job, now, error.code, f"{error.message} Gave up after {tries}.", late_outputs_s)
    # Shown while it waits, so that a user who sees the second attempt also sees why.
    job.error_code, job.error_message = error.code, error.message
    return requeue(job, now, delay_s(job.failures, options.retry_s), late_outputs_s)


def delay_s(failures: int, retry_s: float) -> float:
    """Seconds before the attempt that follows `failures` bad ones: 0 after the first, then doubling from `retry_s`."""
    if failures < 2:
        return 0
    return min(retry_s * 2 ** min(failures - 2, 32), _LONGEST_DELAY_S)


def _garbage(prefixes: Iterable[str], now: float, late_outputs_s: float) -> list[Garbage]:
    """Removed now, and again when nobody can still be storing: a run may outlive the decision to end it."""
    times = (now, now + late_outputs_s) if late_outputs_s else (now,)
    return [Garbage(prefix=prefix, due_at=due_at) for prefix in prefixes for due_at in times]


def _charge(job: Job, now: float, denoised_s: float) -> list[Usage]:
    """What its key pays, if it has one."""
    if not job.owner or denoised_s <= 0:
        return []
    return [Usage(job_id=job.id, owner=job.owner, at=now, gpu_seconds=denoised_s * job.ranks)]


def _denoised_s(job: Job, now: float) -> float:
    """How long the attempt under way has been in a group: what `timings` would say of it if it ended now."""
    return 0.0 if job.denoise_at is None or job.status != "in_progress" else now - job.denoise_at
