"""Bring a configuration up on this machine's Ray, or on a Ray of its own, and take it down again."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import httpx
import ray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.schema import ApplicationStatus

from serve_app import app, claim, guard
from serve_app.applications import Applications
from serve_app.config import Config, load_file
from serve_app.errors import ConfigError, ServeAppError, without_password
from serve_app.jobs.deployment import alive_hosts, check_hosts
from serve_app.preflight import preflight
from serve_app.ray_session import RaySession

Say = Callable[[str], None]

_BUILDERS: dict[str, Callable[[dict[str, Any]], serve.Application]] = {
    "serve_app.app:wan": app.wan,
    "serve_app.app:gateway": app.gateway,
}
# After this long a server that is not ready says why not.
_SAY_WHY_S = 10
# How often a server looks whether its applications are still its own.
_WATCH_S = 2
_LOOK_S = 30
_FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


class Server:
    """A deployment of one YAML file. As a context manager it is up inside the block and gone after it.

    Args:
        path: a file under configs/.
        port: overrides the file's HTTP port.
        own_ray: start a Ray even where one is running, and touch nothing of the running one.
        replace: end or replace the server that runs here, if any, instead of refusing to start.
        dashboard: whether a Ray that is started here runs its dashboard (needed by `serve status`).
        say: called with a line on each thing that happens.

    Raises:
        ConfigError: the file cannot work. Nothing has been started then.
    """

    def __init__(
        self,
        path: Path,
        *,
        port: int | None = None,
        own_ray: bool = False,
        replace: bool = False,
        dashboard: bool = True,
        say: Say = lambda line: None,
    ) -> None:
        self._file, self.config = load_file(path)
        http = self._file.get("http_options") or {}
        self._http = {**http, **({"port": port} if port else {})}
        self._say = say
        self._replace = replace
        self._runtime_env = self._shared_environment()
        self.url = f"http://{self._http.get('host', '127.0.0.1')}:{self._http.get('port', 8000)}".replace(
            "0.0.0.0", "127.0.0.1"
        )
        names = [entry["name"] for entry in self._file["applications"]]
        self._ray = RaySession(
            claim.describe(names, str(path), self.url),
            own=own_ray,
            replace=replace,
            dashboard=dashboard,
            runtime_env=self._runtime_env,
            say=say,
        )
        self._applications: Applications | None = None

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Join the running Ray, or start one, and deploy. Returns before the applications are ready."""
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._applications = Applications(self._targets())
        self._ray.find(int(self._http.get("port", 8000)))
        if not self._ray.own:
            self._ray.join()
            self._look_at_serve(self._applications)
        self._look_around()
        if self._ray.own:
            self._ray.start()
        check_hosts(self.config, alive_hosts())
        guard.set_stop(guard.Stop.IN_ORDER)
        serve.start(
            proxy_location=self._file.get("proxy_location", "EveryNode"),
            http_options=self._http,
            controller_options=self._file.get("controller_options"),
        )
        if self.config.auth.mode == "none":
            who = "anybody who reaches it" if self.config.auth.open else "anybody on this machine"
            self._say(f"auth.mode is none: {who} may use {self.url}")
        self._say(f"loading {self.config.model.name} from {self.config.model.folder}")
        self._applications.deploy()

    def _look_at_serve(self, applications: Applications) -> None:
        ray_address = self._ray.address
        silent = f"Serve on the Ray at {ray_address} does not answer within {_LOOK_S} s: end it with `serve shutdown`"
        with guard.deadline(_LOOK_S, silent):
            was_there = applications.look(ray_address, self._http, replace=self._replace)
        if was_there and self._file.get("controller_options"):
            self._say("controller_options have no effect: Serve runs already, with those of whoever started it")

    def _shared_environment(self) -> dict[str, Any] | None:
        """The `runtime_env` of all applications, which is that of the Ray job here."""
        given = [entry.get("runtime_env") or {} for entry in self._file["applications"]]
        if any(one != given[0] for one in given):
            raise ConfigError("the applications' `runtime_env` differ, expected the same ones (or use `serve run`)")
        return given[0] or None

    def _look_around(self) -> None:
        """Look for the services that the file names, from where they will be used, and for a port of our own."""
        if self._ray.own:
            _check_port(str(self._http.get("host") or "127.0.0.1"), int(self._http.get("port", 8000)))
            with _environment((self._runtime_env or {}).get("env_vars") or {}):
                notes = asyncio.run(preflight(self.config))
        else:
            try:
                notes = ray.get(ray.remote(num_cpus=0, max_retries=0)(_preflight).remote(self.config))
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, ServeAppError) else error from None
        for note in notes:
            self._say(note)

    def _targets(self) -> list[serve.RunTarget]:
        """The file's applications. Building them checks what can be checked before anything starts."""
        targets = []
        for entry in self._file["applications"]:
            builder = _BUILDERS.get(entry.get("import_path"))
            if builder is None:
                raise ConfigError(
                    f"import_path has value {entry.get('import_path')!r}, expected one of {', '.join(_BUILDERS)}"
                )
            targets.append(
                serve.RunTarget(
                    target=builder(entry.get("args") or {}),
                    name=entry["name"],
                    route_prefix=entry.get("route_prefix", "/"),
                )
            )
        return targets

    def wait_ready(self, timeout_s: float = 3600) -> None:
        """Wait until `/readyz` answers 200, telling each deployment as it becomes ready.

        Raises:
            ServeAppError: a deployment failed, or the time is up.
        """
        told: set[str] = set()
        began = time.monotonic()
        deadline = began + timeout_s
        ours = {entry["name"] for entry in self._file["applications"]}
        answers = any(entry["import_path"] == "serve_app.app:gateway" for entry in self._file["applications"])
        while time.monotonic() < deadline:
            states = {name: state for name, state in serve.status().applications.items() if name in ours}
            for name, state in states.items():
                if state.status in _FAILED:
                    raise ServeAppError(f"application {name!r} did not start: {_last_line(state)}")
                for deployment, detail in state.deployments.items():
                    if detail.status.value == "HEALTHY" and deployment not in told:
                        told.add(deployment)
                        self._say(f"{deployment} is ready")
            reason = self._not_ready() if answers else None
            running = all(state.status == ApplicationStatus.RUNNING for state in states.values())
            if told and reason is None and (answers or running):
                return
            if reason and reason not in told and time.monotonic() - began > _SAY_WHY_S:
                told.add(reason)
                self._say(reason)
            time.sleep(0.2)
        raise ServeAppError(f"not ready after {timeout_s:.0f} s")

    def watch(self) -> NoReturn:
        """Serve until the process is stopped.

        Raises:
            ServeAppError: Ray or the applications are no longer there, or no longer this server's.
        """
        assert self._applications is not None
        while True:
            time.sleep(_WATCH_S)
            if self._ray.alive():
                self._applications.check()

    def whereabouts(self) -> list[str]:
        """Lines on where everything is, for people."""
        config = self.config
        store = without_password(config.store.url) if config.store.url else ""
        data = [str(config.home_path), *(place for place in (store, config.storage.url) if place)]
        return [f"page: {self.url}/, API: {self.url}/docs", f"data: {', '.join(data)}", *self._ray.whereabouts()]

    def stop(self) -> None:
        """Take down what this server has deployed; end Ray too where it was started here."""
        guard.set_stop(guard.Stop.UNDER_WAY)
        if ray.is_initialized() and self._applications is not None and not self._ray.gone:
            # Ray's processes all end with a Ray of our own, so the applications need no farewell of their own, but
            # jobs do: the dispatcher hands its leases back when it is deleted.
            gateways = {e["name"] for e in self._file["applications"] if e["import_path"] == "serve_app.app:gateway"}
            self._applications.delete(only=gateways if self._ray.own else None)
        self._ray.end()

    def _not_ready(self) -> str | None:
        """Why the gateway says that it is not, empty where it says nothing; None if it is."""
        try:
            answer = httpx.get(f"{self.url}/readyz", timeout=5)
            return None if answer.status_code == 200 else str(answer.json()["error"]["message"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return ""


def _preflight(config: Config) -> list[str]:
    return asyncio.run(preflight(config))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """These too, for as long as the block runs."""
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        where = f"http_options.port has value {port} and http_options.host {host!r}"
        raise ConfigError(f"{where}, expected an address that is free on this machine: {error.strerror}") from None


def _last_line(state: Any) -> str:
    """The most telling line of an application's status message: Ray puts a traceback into it."""
    messages = [state.message, *(detail.message for detail in state.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if "Error" in line]
    return (ours or lines or ["no reason given"])[-1]
