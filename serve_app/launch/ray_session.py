"""The Ray that a server runs on: either one that runs here and is joined, or one of its own."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import ray

from serve_app.compat.ray import any_agent_port, dead_processes, token_auth_enabled
from serve_app.errors import ServeAppError, one_line
from serve_app.launch import claim, guard, ray_probe

_JOIN_S = 30
# A control process that keeps its state in Redis may come back; nodes wait for it as long by default.
_GONE_S = 60
_AWAY_S = 1
_PACKAGE_FOLDER = str(Path(__file__).parents[2])


class RaySession:
    """A server's connection to a Ray, from the search for one to the end.

    Args:
        server: the description of the server, for others to read.
        own: start a Ray even if one is running.
        replace: first end the server that runs on the Ray.
        dashboard: run the dashboard of a Ray that is started here.
        runtime_env: the `runtime_env` of the Ray job.
        say: called with a line on each thing that happens.
    """

    def __init__(
        self,
        server: claim.Running,
        *,
        own: bool,
        replace: bool,
        dashboard: bool,
        runtime_env: dict[str, Any] | None,
        say: Callable[[str], None],
    ) -> None:
        self.own = own
        self._server = server
        self._replace = replace
        self._dashboard = dashboard
        self._runtime_env = runtime_env
        self._say = say
        self._claims: list[claim.ServerClaim] = []
        self._found: ray_probe.Address | None = None
        self._info: dict[str, Any] = {}
        self._dashboard_url: str | None = None
        self._answered = time.monotonic()
        self.gone = False

    def find(self, port: int) -> None:
        """Decide between joining and starting a Ray, and claim the Ray, or the port, before another server does.

        Args:
            port: the HTTP port, which is claimed if a Ray is to be started.

        Raises:
            ServeAppError: a server runs there already, or the Ray to join does not answer.
        """
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about its own default
        if not self.own:
            wish = os.environ.get("RAY_ADDRESS", "")
            self._claim("the Ray of this machine" if wish in ("", "auto", "local") else f"the Ray at {wish}")
            found = ray_probe.find(self._say)
            if found is not None and self._make_way(found.host_port):
                found = ray_probe.find(self._say)
            if found is not None and found.host_port != wish:  # others may have another name for it
                self._claim(f"the Ray at {found.host_port}")
            self._found = found
            self.own = found is None
        if self.own:
            self._claim(f"port {port}")

    def _claim(self, what: str) -> None:
        self._claims.append(claim.ServerClaim(what, self._server, replace=self._replace))

    def _make_way(self, address: str) -> bool:
        """End the servers with the same applications on a Ray, or refuse if they may not be replaced.

        Returns:
            True if there was such a server.
        """
        others = [one for one in claim.running() if one.ray == address and one.pid != self._server.pid]
        same = [one for one in others if set(one.applications) & set(self._server.applications)]
        for one in same:
            if not self._replace:
                raise claim.refusal(one)
            self._say(f"ending the server that runs: {one}")
            claim.end(one)
        return bool(same)

    def join(self) -> None:
        """Join the Ray that `find` has found.

        Raises:
            ServeAppError: it does not let this process in.
        """
        assert self._found is not None
        try:
            with (
                guard.deadline(_JOIN_S, f"{self._found} did not let us in within {_JOIN_S} s: end it with `ray stop`"),
                _signal_handlers_kept(),
            ):
                context = ray.init(
                    address=self._found.host_port,
                    namespace="serve",
                    runtime_env=self._runtime_env,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
        except Exception as error:
            raise ServeAppError(f"cannot join {self._found}: {one_line(error)}") from error
        self._say(f"joined {self._found}")
        self._connected(context)

    def start(self) -> None:
        """Start a Ray on this machine.

        Raises:
            ServeAppError: it does not start.
        """
        self._say("starting Ray on this machine")
        os.environ.pop("RAY_ADDRESS", None)  # it names another Ray
        # Processes that start there later, such as a submitted job, find this Python and this package.
        _put_first("PATH", str(Path(sys.executable).parent))
        _put_first("PYTHONPATH", _PACKAGE_FOLDER)
        try:
            with _signal_handlers_kept(), any_agent_port():
                context = ray.init(
                    address="local",
                    namespace="serve",
                    runtime_env=self._runtime_env,
                    include_dashboard=self._dashboard,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except Exception as error:
            raise ServeAppError(f"Ray did not start: {one_line(error)}") from error
        self._connected(context)

    def _connected(self, context: Any) -> None:
        """Note where Ray's parts are, and write into the claims on which Ray this server runs."""
        self._info, self._dashboard_url = context.address_info, context.dashboard_url
        self._server = changed(self._server, ray=self.address)
        for one in self._claims:
            one.update(self._server)

    @property
    def address(self) -> str:
        """The host:port of Ray's control process."""
        return str(self._info["gcs_address"])

    def alive(self) -> bool:
        """Tell whether Ray's control process answers, without waiting for it as Ray's own calls do.

        Raises:
            ServeAppError: it has ended.
        """
        if self.own:
            # Nothing brings back what was started here.
            self.gone = bool(dead_processes() & {"gcs_server", "raylet"})
        elif ray_probe.answers(self.address):
            self._answered = time.monotonic()
        elif time.monotonic() - self._answered > _GONE_S:
            self.gone = True
        if self.gone:
            raise ServeAppError(f"the Ray at {self.address} has ended, and the applications with it")
        return self.own or time.monotonic() - self._answered < _AWAY_S

    def end(self) -> None:
        """Leave the Ray, or end it if it was started here."""
        if ray.is_initialized():
            ray.shutdown()
        for one in self._claims:
            one.release()
        self._claims.clear()

    def whereabouts(self) -> list[str]:
        """Return lines for people: Ray's logs, its dashboard, and what another shell exports for Ray's commands."""
        lines = [f"logs: {self._info['session_dir']}/logs"]
        exports = {"RAY_ADDRESS": self.address}
        if self._dashboard_url:
            exports["RAY_DASHBOARD_ADDRESS"] = url = f"http://{self._dashboard_url}"
            lines.append(f"Ray's dashboard: {url}")
        if token_auth_enabled():
            exports["RAY_AUTH_MODE"] = "token"
            if os.environ.get("RAY_AUTH_TOKEN"):
                exports["RAY_AUTH_TOKEN"] = "…"  # a secret of the user who set it here
            else:
                path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
                exports["RAY_AUTH_TOKEN_PATH"] = str(path)
            if self._dashboard_url:
                lines[-1] += ", which asks for what `ray get-auth-token` prints"
        shell = " ".join(f"{name}={shlex.quote(value)}" for name, value in exports.items())
        return [*lines, f"for `ray status`, `serve status` and `ray job submit` in another shell: export {shell}"]


def _put_first(variable: str, folder: str) -> None:
    """Put a folder first in an environment variable that lists folders."""
    others = [one for one in os.environ.get(variable, "").split(os.pathsep) if one and one != folder]
    os.environ[variable] = os.pathsep.join([folder, *others])


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the signal handlers that `ray.init` replaces: its own for SIGTERM prints a backtrace and aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
