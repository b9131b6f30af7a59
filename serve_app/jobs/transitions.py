"""Transitions of a job's row when an attempt ends: tried again, failed or completed.

Rules only: the caller holds the row's lock, and stores the returned rows in the same transaction. They are the files
that are garbage now, the usage that its key is charged, and the event of a job that has ended, so that no job ends
without its notification. Times are seconds since the epoch by the database's clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from serve_app import config
from serve_app.db.notifications import event_of
from serve_app.db.tables import CANCELLED, Base, Garbage, Job, Usage
from serve_app.errors import JobFailed
from serve_app.events import Done
from serve_app.jobs.assignment import Rollout, move

# Longest wait between two attempts, in seconds. A longer one would not help: jobs can wait for what is away anyway.
_LONGEST_DELAY_S = 60
# Error codes of losses around a job: its group outside of its steps, a process that drove it, its dispatcher, storage.
_INTERRUPTIONS = {"group_lost", "worker_lost", "lease_expired", "store_failed"}
# Error codes of ends that the owner chose: the key is charged for the GPUs' time all the same.
_CHARGED = {CANCELLED, "deadline_exceeded"}


def complete(job: Job, now: float, done: Done, late_outputs_s: float) -> list[Base]:
    """End a job with its video. Files of earlier attempts and saved states become garbage."""
    job.status = "completed"
    job.completed_at = now
    job.progress = 100
    job.step, job.seconds_left = job.steps, None
    job.outputs, job.timings = dict(done.outputs), dict(done.timings)
    job.warnings = [*job.warnings, *done.warnings]
    job.size_bytes, job.revision, job.finish_result = done.size_bytes, done.revision, done.finished
    job.group_s, job.passes = done.group_s, done.passes
    job.lease_owner = job.lease_until = None
    job.error_code = job.error_message = None
    earlier = [f"videos/{job.id}/{attempt}" for attempt in range(1, job.attempt)]
    return [
        event_of(job),
        *_garbage([*earlier, job.state_prefix], now, late_outputs_s),
        *_charge(job, now, done.timings.get("denoise", 0.0), done.finish_gpu_seconds),
    ]


def fail(job: Job, now: float, code: str, message: str, late_outputs_s: float) -> list[Base]:
    """End a job without a video."""
    charge = _charge(job, now, _denoised_s(job, now)) if code in _CHARGED else []
    job.status = "failed"
    job.completed_at = now
    job.error_code, job.error_message = code, message
    job.lease_owner = job.lease_until = job.seconds_left = None
    prefixes = [f"videos/{job.id}", job.state_prefix] if job.attempt else []
    return [event_of(job), *_garbage(prefixes, now, late_outputs_s), *charge]


def forget(job: Job, now: float, late_outputs_s: float) -> list[Base]:
    """Return the rows that a job leaves behind when its own is about to be deleted."""
    prefixes = [f"videos/{job.id}"]
    if job.attempt and not job.finished:
        prefixes.append(job.state_prefix)
    late = job.attempt and (job.status != "completed" or job.attempt > 1)
    charge = [] if job.finished else _charge(job, now, _denoised_s(job, now))
    return [*_garbage(prefixes, now, late_outputs_s if late else 0), *charge]


def requeue(job: Job, now: float, delay_s: float, late_outputs_s: float) -> list[Base]:
    """Put a job back to its place in the queue, or end it if it was cancelled. Its saved states stay."""
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
    """Decide whether a job is tried again, after an attempt that began at `resumed_step` ended with a retryable error.

    Three things are counted. An interruption is a loss that the job did not cause, because none of its steps was
    running; a job may have many. A step that loses its group again and again is taken for the job's fault
    ("poisonous"). Every other failure counts while attempts in a row begin no further than the attempt before.
    """
    if resumed_step > job.resumed_step:
        job.resumed_step, job.failures = resumed_step, 0
    if is_interruption(error):
        job.interruptions += 1
        if job.interruptions >= options.max_interruptions:
            message = f"{error.message} Gave up after {job.interruptions} interruptions."
            return fail(job, now, error.code, message, late_outputs_s)
        # Try at once, unless this attempt was very short: then what was lost is probably not back yet.
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
    # The error is shown while the job waits, so that a user who sees the second attempt also sees why.
    job.error_code, job.error_message = error.code, error.message
    return requeue(job, now, delay_s(job.failures, options.retry_s), late_outputs_s)


def is_interruption(error: JobFailed) -> bool:
    """Return whether an attempt ended by a loss that the job did not cause, since none of its steps was running."""
    return error.code in _INTERRUPTIONS and error.step is None


def failed_on_canary(job: Job, now: float, error: JobFailed, served: Rollout) -> list[Base]:
    """Give a job that a canary failed to the stable pipeline, where it starts with a clean record."""
    job.tried_on, job.tried_at = job.pipeline, now
    job.failures = job.interruptions = job.losses = 0
    job.lost_step = None
    move(job, served)
    job.error_code, job.error_message = error.code, error.message
    return requeue(job, now, 0, 0)


def delay_s(failures: int, retry_s: float) -> float:
    """Return the seconds to wait after `failures` failures: 0 after the first, then doubling from `retry_s`."""
    if failures < 2:
        return 0
    return min(retry_s * 2 ** min(failures - 2, 32), _LONGEST_DELAY_S)


def _garbage(prefixes: Iterable[str], now: float, late_outputs_s: float) -> list[Garbage]:
    """Have folders removed now, and again when no run can still be storing: it may outlive the decision to end it."""
    times = (now, now + late_outputs_s) if late_outputs_s else (now,)
    return [Garbage(prefix=prefix, due_at=due_at) for prefix in prefixes for due_at in times]


def _charge(job: Job, now: float, denoised_s: float, finish_gpu_s: float = 0.0) -> list[Usage]:
    """Return the usage that the job's key is charged, if it has one."""
    if not job.owner or denoised_s + finish_gpu_s <= 0:
        return []
    gpu_seconds = denoised_s * job.ranks + finish_gpu_s
    return [Usage(job_id=job.id, owner=job.owner, at=now, gpu_seconds=gpu_seconds)]


def _denoised_s(job: Job, now: float) -> float:
    """Return the seconds that the current attempt has denoised, as `timings` would say if it ended now."""
    return 0.0 if job.denoise_at is None or job.status != "in_progress" else now - job.denoise_at
