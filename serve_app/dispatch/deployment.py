"""The dispatcher as a Serve deployment, and a pipeline application as its `Runner`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import suppress
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    PlasmaObjectNotAvailable,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    RpcError,
    TaskCancelledError,
    TaskPlacementGroupRemoved,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.schema import ApplicationStatus

from serve_app.config import Config
from serve_app.dispatch.dispatcher import Dispatcher
from serve_app.dispatch.fleet import FleetReporter
from serve_app.dispatch.gauges import Gauges
from serve_app.dispatch.generation import Gate
from serve_app.dispatch.judge import Judge
from serve_app.dispatch.pipelines import Pipelines
from serve_app.dispatch.rabbitmq import broker
from serve_app.dispatch.run import PipelineUnavailable
from serve_app.dispatch.shadowing import Shadowing
from serve_app.dispatch.steering import DegradeLoop
from serve_app.errors import JobFailed
from serve_app.events import Event
from serve_app.job_spec import JobSpec
from serve_app.jobs.degrading import Steering
from serve_app.jobs.store import JobStore
from serve_app.metrics import export
from serve_app.notify.notifier import Notifier
from serve_app.replica import alive_hosts, check_hosts, starting, this_process
from serve_app.storage import Storage
from serve_app.wan.cost import video_tflop

# Failures of a machine or a replica rather than of a request: another attempt may well succeed. Each stands for its
# subclasses too: ObjectLostError for an owner that died and for what cannot be reconstructed, RayActorError for an
# actor that died or cannot be reached. The router raises RayServeException for a replica that died while another stage
# waited for its answer.
_LOST = (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    PlasmaObjectNotAvailable,
    RayActorError,
    RayServeException,
    RaySystemError,
    RpcError,
    TaskCancelledError,
    TaskPlacementGroupRemoved,
    TaskUnschedulableError,
    WorkerCrashedError,
)
_AWAY = (DeploymentUnavailableError, BackPressureError)


class ServePipeline:
    """A `Runner` over the pipeline of a Serve application.

    Args:
        application: the application's name; its ingress has `generate(job, caller)`, which yields events.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._handle: Any = None

    async def __call__(self, job: JobSpec) -> AsyncGenerator[Event, None]:
        """Make the video of a job and yield its events. Closing the generator cancels it."""
        handle = await self._connected()
        response = None
        try:
            response = handle.generate.remote(job, this_process())
            async for event in response:
                yield event
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Serve raises this too for a call that was cancelled at its far end, where nobody cancelled us.
            raise _lost() from None
        except Exception as error:
            self._handle = None  # the application may have been deployed anew
            raise translate(error) from error
        finally:
            if response is not None:
                # This has no effect once the stream has ended. It raises again if the call could not even be sent.
                with suppress(Exception):
                    response.cancel()

    async def runs(self) -> bool:
        """Return whether Serve says that the application runs."""
        try:
            status = await asyncio.to_thread(serve.status)
        except (RayServeException, RayError, OSError):
            return False
        application = status.applications.get(self._application)
        return application is not None and application.status == ApplicationStatus.RUNNING

    async def prepare(self) -> None:
        """Find the pipeline's replicas, if it is deployed already, so that the first job does not wait for that."""
        with suppress(PipelineUnavailable):
            await self._connected()

    async def _connected(self) -> Any:
        if self._handle is None:
            try:
                # This asks the controller and blocks, so it must not run on the event loop.
                handle = await asyncio.to_thread(serve.get_app_handle, self._application)
                self._handle = handle.options(stream=True)
            except (RayServeException, RayError, OSError) as error:
                raise PipelineUnavailable(f"application {self._application!r} is not deployed") from error
        return self._handle


def translate(error: Exception) -> Exception:
    """Return what an exception from a Serve handle means for the job.

    Returns:
        `JobFailed` if the job failed or a process was lost, `PipelineUnavailable` if a stage takes no requests, else
        the original.
    """
    cause: Any = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
        cause = cause.cause
    if isinstance(cause, JobFailed):
        return JobFailed(cause.code, cause.message, cause.retryable, cause.step)
    if isinstance(cause, _AWAY):
        return PipelineUnavailable(f"a deployment takes no requests: {type(cause).__name__}")
    if isinstance(cause, _LOST):
        return _lost()
    return cause if isinstance(cause, Exception) else error


def _lost() -> JobFailed:
    return JobFailed("worker_lost", "A process that worked on this video was lost.", retryable=True)


async def replicas(application: str) -> dict[str, int]:
    """Return the number of running replicas of each deployment of an application; none if it is not deployed."""
    # This asks the controller and blocks, so it must not run on the event loop.
    status = await asyncio.to_thread(serve.status)
    if (there := status.applications.get(application)) is None:
        return {}
    return {name: one.replica_states.get("RUNNING", 0) for name, one in there.deployments.items()}


def steering(config: Config) -> Steering:
    """Return when to offer less."""
    options = config.denoiser.autoscaling
    groups = options.max_replicas
    if config.denoiser.experts == "split":
        groups += (config.denoiser.low_noise_autoscaling or options).max_replicas
    return Steering(options.target_wait_s.model_dump(), groups, config.degrade.start_s)


@serve.deployment(name="dispatcher")
class DispatcherDeployment:
    """A replica with one dispatcher and one notifier. Replicas share jobs and deliveries through the store."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: Config, expert: dict[str, Any] | None = None
    ) -> None:
        with starting():
            check_hosts(config, alive_hosts())
            self._broker = broker(config)
            self._store = JobStore.of(config, work_of=None if expert is None else partial(video_tflop, expert))
            await self._store.start()
            storage = Storage(config.storage_options)
        if self._broker is not None:
            self._broker.start()
        options = config.dispatcher
        pipeline = ServePipeline(options.pipeline)
        pipelines = Pipelines(
            options.pipeline, lambda name: pipeline if name == options.pipeline else ServePipeline(name)
        )
        generation = options.generation or os.environ.get("WAN_SERVE_GENERATION", "")
        gate = Gate(self._store, generation, options.drain_s, pipeline.runs)
        self._dispatcher = Dispatcher(self._store, storage, pipelines, options, self._broker, gate=gate)
        self._parts = (
            Judge(self._store, options),
            Shadowing(self._store, storage, pipelines, options),
            self._dispatcher,
            Notifier(self._store.database, config),
            Gauges(self._store, storage),
            FleetReporter(self._store, options.pipeline, partial(replicas, options.pipeline)),
            DegradeLoop(self._store, steering(config)),
        )
        export.start("dispatcher")
        for part in self._parts:
            part.start()
        self._preparing = asyncio.create_task(pipeline.prepare(), name="prepare")

    async def wake(self) -> None:
        """Have the dispatcher look at the store now."""
        self._dispatcher.wake()

    async def check_health(self) -> None:
        """Raise if one of the loops has ended: Serve then replaces the replica."""
        for part in self._parts:
            part.raise_if_ended()

    async def __del__(self) -> None:
        if hasattr(self, "_parts"):
            await asyncio.gather(*(part.stop() for part in self._parts))
            if self._broker is not None:
                await self._broker.close()
            await self._store.close()
