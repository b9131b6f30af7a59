from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError, TaskCancelledError, WorkerCrashedError

from serve_app.errors import JobFailed
from serve_app.jobs.deployment import translate


def wrapped(cause: Exception) -> Exception:
    """As it arrives from a handle."""
    error = RayTaskError("generate", "a long traceback", cause, proctitle="x", pid=1, ip="127.0.0.1")
    return error.as_instanceof_cause()


@pytest.mark.parametrize("retryable", [False, True])
def test_a_job_failure_keeps_its_words(retryable: bool) -> None:
    failure = JobFailed("out_of_memory", "Needs 80 GiB.", retryable)
    for error in (failure, wrapped(failure), wrapped(wrapped(failure))):
        found = translate(error)
        assert isinstance(found, JobFailed)
        assert (found.code, found.message, found.retryable) == ("out_of_memory", "Needs 80 GiB.", retryable)


@pytest.mark.parametrize(
    "loss", [ActorDiedError(), WorkerCrashedError(), OutOfMemoryError("killed"), TaskCancelledError()], ids=repr
)
def test_a_lost_process_deserves_another_attempt(loss: Exception) -> None:
    for error in (loss, wrapped(loss)):
        found = translate(error)
        assert isinstance(found, JobFailed)
        assert (found.code, found.retryable) == ("worker_lost", True)


def test_anything_else_is_shown_as_it_was() -> None:
    found = translate(wrapped(ZeroDivisionError("division by zero")))
    assert (type(found), str(found)) == (ZeroDivisionError, "division by zero")
