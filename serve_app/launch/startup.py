"""The wait until applications are ready, with a line for whatever becomes ready or is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from serve_app.capacity import Need, described
from serve_app.errors import ServeAppError
from serve_app.shortage import hosts

Say = Callable[[str], None]

# A server that is not ready after this long says why.
_SAY_WHY_S = 10
_FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
# Part of Serve's message for a deployment that it has found no place for, after half a minute of trying.
_NO_PLACE = "to be scheduled"


class Startup:
    """The start of applications, watched until they are ready.

    Args:
        applications: their names.
        url: the gateway's URL; None if it answers no HTTP, and then the applications' status decides.
        wanted: the resources that their deployments ask for.
        say: called with a line on each thing that happens.
    """

    def __init__(self, applications: Collection[str], url: str | None, wanted: Sequence[Need], say: Say) -> None:
        self._applications = set(applications)
        self._url = url
        self._wanted = {need.deployment: need for need in wanted}
        self._say = say
        self._told: set[str] = set()
        self._short: dict[str, str] = {}

    def wait(self, timeout_s: float) -> None:
        """Wait until `/readyz` answers 200.

        Raises:
            ServeAppError: a deployment failed, or the time is up.
        """
        began = time.monotonic()
        while time.monotonic() < began + timeout_s:
            running = self._look()
            reason = None if self._url is None else not_ready(self._url)
            if self._told and reason is None and (self._url is not None or running):
                return
            if reason and reason not in self._told and time.monotonic() - began > _SAY_WHY_S:
                self._told.add(reason)
                self._say(reason)
            time.sleep(0.2)
        raise ServeAppError(f"not ready after {timeout_s:.0f} s")

    def _look(self) -> bool:
        """Say what is new, and return True if all applications run.

        Raises:
            ServeAppError: one of them failed.
        """
        states = {name: state for name, state in serve.status().applications.items() if name in self._applications}
        for name, state in states.items():
            if state.status in _FAILED:
                raise ServeAppError(f"application {name!r} did not start: {_last_line(state)}")
            for deployment, detail in state.deployments.items():
                if detail.status.value == "HEALTHY" and deployment not in self._told:
                    self._told.add(deployment)
                    self._say(f"{deployment} is ready")
                if detail.status.value != "HEALTHY" and _NO_PLACE in detail.message:
                    self._tell_what_is_missing(deployment)
        return len(states) == len(self._applications) and all(
            state.status == ApplicationStatus.RUNNING for state in states.values()
        )

    def _tell_what_is_missing(self, deployment: str) -> None:
        """Say what a deployment asks for if that is not free, again whenever the numbers change.

        Amounts that are not free may already be granted to this deployment, for a process that still starts.
        """
        need, there, free = self._wanted.get(deployment), hosts(), ray.available_resources()
        if need is None:
            return
        # If all of it is free on the only host, its process merely starts slowly. Several hosts do not tell as much.
        if len(there) == 1 and all(free.get(name, 0) >= amount for name, amount in need.total.items()):
            return
        rest = ", ".join(f"{round(free.get(name, 0), 4):g} {name}" for name in need.total)
        asks = f"{deployment} has no process yet: it asks for {need}"
        line = f"{asks}; the cluster has {described(there)}; free: {rest}"
        if self._short.get(deployment) != line:
            self._short[deployment] = line
            self._say(line)


def not_ready(url: str) -> str | None:
    """Return the gateway's reason for not being ready, empty if it gives none; None if it is ready."""
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5, trust_env=False)
        said = answer.json()
        if answer.status_code == 200:  # it accepts jobs; degraded, they wait for what is being replaced
            return str(said["reason"]) if said["status"] == "degraded" else None
        return str(said["error"]["message"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return ""


def _last_line(state: Any) -> str:
    """Return the most telling line of an application's status message: Ray puts a traceback into it."""
    messages = [state.message, *(detail.message for detail in state.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if "Error" in line]
    return (ours or lines or ["no reason given"])[-1]
