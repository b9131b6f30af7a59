"""The pipelines that a dispatcher drives, as one `Runner` that hands each job to its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from serve_app.dispatch.run import Runner
from serve_app.events import Event
from serve_app.job_spec import JobSpec


class Pipelines:
    """A `Runner` over pipelines that are known by name.

    Args:
        default: the pipeline of jobs that name none.
        make: returns the pipeline of a name; called once for each.
    """

    def __init__(self, default: str, make: Callable[[str], Runner]) -> None:
        self._default = default
        self._make = make
        self._runners: dict[str, Runner] = {}

    def find(self, name: str | None = None) -> Runner:
        """Return the pipeline of a name, by default the default one."""
        name = name or self._default
        if name not in self._runners:
            self._runners[name] = self._make(name)
        return self._runners[name]

    async def __call__(self, job: JobSpec) -> AsyncGenerator[Event, None]:
        """Make the video of a job and yield its events. Closing the generator cancels it."""
        async with aclosing(self.find(job.pipeline)(job)) as events:
            async for event in events:
                yield event
