"""The dispatcher as a Serve deployment, and a pipeline application as its `Runner`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RaySystemError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)

from serve_app.config import Config
from serve_app.errors import JobFailed
from serve_app.events import Event
from serve_app.jobs.dispatcher import Dispatcher, PipelineUnavailable
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage

# What happens to a machine or a replica, not to a request: another attempt may well succeed.
_LOST = (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RaySystemError,
    ReplicaUnavailableError,
    TaskCancelledError,
    WorkerCrashedError,
)


class ServePipeline:
    """A `Runner` over the pipeline of a Serve application.

    Args:
        application: the application's name; its ingress has `generate(job)`, which yields events.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._handle: Any = None

    async def __call__(self, job: dict[str, Any]) -> AsyncGenerator[Event, None]:
        if self._handle is None:
            try:
                # Asks the controller and blocks, so not on the event loop.
                self._handle = await asyncio.to_thread(serve.get_app_handle, self._application)
            except RayServeException as error:
                raise PipelineUnavailable(f"application {self._application!r} is not deployed") from error
        response = self._handle.options(stream=True).generate.remote(job)
        try:
            async for event in response:
                yield event
        except (DeploymentUnavailableError, BackPressureError) as error:
            raise PipelineUnavailable(f"application {self._application!r} takes no requests") from error
        except Exception as error:
            self._handle = None  # the application may have been deployed anew
            raise translate(error) from error
        finally:
            # Without effect once the stream has ended.
            response.cancel()


def translate(error: Exception) -> Exception:
    """What an exception from a Serve handle means for the job: `JobFailed` where we know, else the original."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, JobFailed):
        return JobFailed(cause.code, cause.message, cause.retryable)
    if isinstance(cause, _LOST):
        return JobFailed("worker_lost", "A process that worked on this video was lost.", retryable=True)
    return cause if isinstance(cause, Exception) else error


@serve.deployment(name="dispatcher")
class DispatcherDeployment:
    """One dispatcher per replica; replicas share the jobs by the store."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it
        self._store = JobStore(config.store_url, config.dispatcher.late_outputs_s)
        await self._store.start()
        pipeline = ServePipeline(config.dispatcher.pipeline)
        self._dispatcher = Dispatcher(self._store, Storage(config.storage_url), pipeline, config.dispatcher)
        self._dispatcher.start()

    async def wake(self) -> None:
        """There is something new in the store."""
        self._dispatcher.wake()

    async def check_health(self) -> None:
        """Called by Serve; raising replaces the replica."""
        self._dispatcher.check()

    async def __del__(self) -> None:
        if hasattr(self, "_dispatcher"):
            await self._dispatcher.stop()
            await self._store.close()
