from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
import ray.serve.exceptions
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from serve_app.config import Config, StoreConfig
from serve_app.dispatch.deployment import ServePipeline, translate
from serve_app.dispatch.rabbitmq import broker
from serve_app.dispatch.run import PipelineUnavailable
from serve_app.errors import ConfigError, JobFailed
from serve_app.events import Event, Progress
from serve_app.job_spec import JobSpec
from serve_app.replica import check_hosts
from tests.support.fakes import PARAMS


def wrapped(cause: Exception) -> Exception:
    """Return an error as a Serve handle raises it."""
    error = RayTaskError("generate", "a long traceback", cause, proctitle="x", pid=1, ip="127.0.0.1")
    return error.as_instanceof_cause()


@pytest.mark.parametrize("retryable", [False, True])
def test_a_job_failure_keeps_its_words(retryable: bool) -> None:
    failure = JobFailed("group_lost", "A rank was lost.", retryable, step=7)
    for error in (failure, wrapped(failure), wrapped(wrapped(failure))):
        found = translate(error)
        assert isinstance(found, JobFailed)
        assert (found.code, found.message, found.retryable, found.step) == (
            "group_lost",
            "A rank was lost.",
            retryable,
            7,
        )


# Every exception of the installed Ray, so that a new one is noticed. Lost: a machine's fault, worth another attempt.
LOST = {
    *("ActorDiedError", "ActorPlacementGroupRemoved", "ActorUnavailableError", "ActorUnschedulableError"),
    *("LocalRayletDiedError", "NodeDiedError", "ObjectFetchTimedOutError", "ObjectFreedError", "ObjectLostError"),
    *("ObjectReconstructionFailedError", "ObjectStoreFullError", "OutOfDiskError", "OutOfMemoryError"),
    *("OwnerDiedError", "PlasmaObjectNotAvailable", "RayActorError", "RaySystemError", "RequestCancelledError"),
    *("RayServeException", "ReferenceCountingAssertionError", "ReplicaUnavailableError", "RpcError"),
    *("TaskCancelledError", "TaskPlacementGroupRemoved", "TaskUnschedulableError", "WorkerCrashedError"),
    # Errors of features that we do not use, and subclasses of those above.
    *("RayCgraphCapacityExceeded", "RayChannelError", "RayChannelTimeoutError", "RayDirectTransportError"),
    *("StreamingGeneratorReplayInconsistentError", "gRPCStatusError"),
}
AWAY = {"BackPressureError", "DeploymentUnavailableError"}
# Errors of our code or configuration, or that never come out of a handle.
OURS = {
    *("ActorAlreadyExistsError", "ActorHandleNotFoundError", "AsyncioActorExit", "AuthenticationError"),
    *("CrossLanguageError", "GetTimeoutError", "ObjectRefStreamEndOfStreamError"),
    *("OufOfBandObjectRefSerializationException", "PendingCallsLimitExceeded", "RayError"),
    *("RuntimeEnvSetupError", "UnserializableException", "UserCodeException"),
}


def kinds() -> list[type[Exception]]:
    return [
        kind
        for module in (ray.exceptions, ray.serve.exceptions)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, (RayError, RayServeException)) and kind is not RayTaskError
    ]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_what_each_exception_of_ray_means(kind: type[Exception]) -> None:
    name = kind.__name__
    error = kind.__new__(kind)  # each has other arguments, none of which matter
    for found in (translate(error), translate(wrapped(error))):
        if name in LOST:
            assert isinstance(found, JobFailed), found
            assert (found.code, found.retryable, found.step) == ("worker_lost", True, None)
        elif name in AWAY:
            assert isinstance(found, PipelineUnavailable)
        else:
            assert name in OURS, "a new exception of Ray: say what it means for a job"
            assert not isinstance(found, (JobFailed, PipelineUnavailable))


def test_anything_else_is_shown_as_it_was() -> None:
    found = translate(wrapped(ZeroDivisionError("division by zero")))
    assert (type(found), str(found)) == (ZeroDivisionError, "division by zero")


class Response:
    """A call that yields one step and then ends as the test says."""

    def __init__(self, then: BaseException | None, *, on_cancel: Exception | None = None) -> None:
        self._then = then
        self._on_cancel = on_cancel
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[Event]:
        yield Progress("encode", 0, 1)
        if self._then is None:
            await asyncio.Event().wait()
        else:
            raise self._then

    def cancel(self) -> None:
        self.cancelled = True
        if self._on_cancel is not None:
            raise self._on_cancel


def pipeline(response: Response) -> ServePipeline:
    pipeline = ServePipeline("wan")
    pipeline._handle = SimpleNamespace(generate=SimpleNamespace(remote=lambda job, caller: response))
    return pipeline


async def events(run: ServePipeline) -> list[Event]:
    return [event async for event in run(JobSpec("video_1", PARAMS, "videos/video_1/1"))]


async def test_a_call_that_is_cancelled_at_its_far_end_is_a_lost_worker() -> None:
    """Serve raises CancelledError for it, which would otherwise end the run without a word."""
    response = Response(asyncio.CancelledError())
    with pytest.raises(JobFailed) as error:
        await events(pipeline(response))
    assert (error.value.code, error.value.retryable) == ("worker_lost", True)
    assert response.cancelled


async def test_a_run_that_is_cancelled_here_cancels_the_call() -> None:
    response = Response(None)
    task = asyncio.create_task(events(pipeline(response)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert response.cancelled


@pytest.mark.parametrize(
    "away", [DeploymentUnavailableError("x"), BackPressureError(1, 1)], ids=lambda error: type(error).__name__
)
async def test_a_pipeline_that_takes_no_requests_is_away(away: Exception) -> None:
    """Cancelling a call that could not be sent raises once more what kept it from being sent."""
    run = pipeline(Response(away, on_cancel=away))
    with pytest.raises(PipelineUnavailable):
        await events(run)
    assert run._handle is None  # looked up anew: it may be deployed under another name of its ingress


@pytest.mark.parametrize(
    "trouble",
    [RayServeException("not deployed"), ActorDiedError(), RayActorError(), ConnectionError("no GCS")],
    ids=lambda error: type(error).__name__,
)
async def test_a_controller_that_cannot_be_asked_is_away(trouble: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(name: str) -> Any:
        raise trouble

    monkeypatch.setattr("serve_app.dispatch.deployment.serve.get_app_handle", ask)
    with pytest.raises(PipelineUnavailable, match="'wan' is not deployed"):
        await events(ServePipeline("wan"))
    await ServePipeline("wan").prepare()  # the first job will tell


async def test_the_first_job_does_not_wait_for_the_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Handle:
        def options(self, stream: bool) -> Handle:
            asked.append("replicas")
            return self

    looks = Handle()

    def ask(name: str) -> Any:
        asked.append(name)
        return looks

    monkeypatch.setattr("serve_app.dispatch.deployment.serve.get_app_handle", ask)
    run = ServePipeline("wan")
    await run.prepare()
    assert asked == ["wan", "replicas"]
    assert await run._connected() is looks and asked == ["wan", "replicas"]


def test_sqlite_serves_one_host() -> None:
    config = Config(home="/data")
    check_hosts(config, 1)
    check_hosts(Config(store=StoreConfig(shared_disk=True)), 3)
    check_hosts(Config(store=StoreConfig(url="postgresql://127.0.0.1/wan")), 3)
    with pytest.raises(
        ConfigError, match=r"^store\.url has value 'sqlite.*/data/jobs\.db', expected PostgreSQL.* has 3"
    ):
        check_hosts(config, 3)


def test_the_store_is_enough_unless_a_broker_is_named() -> None:
    assert broker(Config()) is None


async def test_a_pipeline_runs_when_serve_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def status() -> SimpleNamespace:
        if not found:
            raise RayServeException("there is no Serve")
        return SimpleNamespace(applications=found)

    monkeypatch.setattr("serve_app.dispatch.deployment.serve.status", status)
    pipeline = ServePipeline("wan")
    assert not await pipeline.runs()
    found["gateway"] = SimpleNamespace(status="RUNNING")
    assert not await pipeline.runs()
    for state, runs in (("DEPLOYING", False), ("RUNNING", True), ("UNHEALTHY", False)):
        found["wan"] = SimpleNamespace(status=state)
        assert await pipeline.runs() == runs
