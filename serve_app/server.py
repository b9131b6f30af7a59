"""Bring a configuration up on this machine's Ray, or on a Ray of its own, and take it down again."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import ray
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.exceptions import RayServeException

from serve_app.address import base_url
from serve_app.config import Config, load_file
from serve_app.errors import ConfigError, ServeAppError
from serve_app.jobs.deployment import alive_hosts, check_hosts
from serve_app.preflight import preflight
from serve_app.readiness import Readiness, refuse_the_impossible
from serve_app.targets import build, where_data_goes

Say = Callable[[str], None]


class Server:
    """A deployment of one YAML file. As a context manager it is up inside the block and gone after it.

    Args:
        path: a file under configs/.
        port: overrides the file's HTTP port.
        own_ray: start a Ray even where one is running, and touch nothing of the running one.
        dashboard: whether a Ray that is started here runs its dashboard (needed by `serve status`).
        say: called with a line on each thing that happens.

    Attributes:
        url: where the gateway answers, on this machine; empty if it does not.

    Raises:
        ConfigError: the file cannot work. Nothing has been started then.
    """

    def __init__(
        self,
        path: Path,
        *,
        port: int | None = None,
        own_ray: bool = False,
        dashboard: bool = True,
        say: Say = lambda line: None,
    ) -> None:
        self._file, self.config = load_file(path)
        self._http = {**self._file["http_options"], **({"port": port} if port else {})}
        self._dashboard = dashboard
        self._say = say
        self._own_ray = own_ray
        self._built = build(path, self._file, self.config)
        self._runtime_env = self._built.runtime_env
        routes = self._built.gateways
        reached = routes and self._file.get("proxy_location") != "Disabled"
        self.url = base_url(self._http, routes[0]) if reached else ""
        self._needs = self._built.needs

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
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about its own default
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        targets = self._targets()
        if not self._own_ray:
            try:
                ray.init(
                    address="auto",
                    namespace="serve",
                    runtime_env=self._runtime_env,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
                self._say("joined the running Ray cluster")
            except ConnectionError:
                self._own_ray = True
        self._look_around()
        if self._own_ray:
            self._say("starting Ray on this machine")
            ray.init(
                address="local",
                namespace="serve",
                runtime_env=self._runtime_env,
                include_dashboard=self._dashboard,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        check_hosts(self.config, alive_hosts())
        refuse_the_impossible(self._needs)
        serve.start(
            proxy_location=self._file.get("proxy_location", "EveryNode"),
            http_options=self._http,
            controller_options=self._file.get("controller_options"),
        )
        if self.config.auth.mode == "none" and self.url:
            who = "anybody who reaches it" if self.config.auth.open else "anybody on this machine"
            self._say(f"auth.mode is none: {who} may use {self.url}")
        self._say(f"loading {self.config.model.name} from {self.config.model.folder}")
        serve.run_many(
            targets,
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def _look_around(self) -> None:
        """Look for the services that the file names, from where they will be used, and for a port of our own."""
        if self._own_ray:
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
        """Return the file's applications. Building them checks what can be checked before anything starts."""
        for note in self._built.notes:
            self._say(note)
        self._say(where_data_goes(self.config))
        return self._built.run

    def wait_ready(self, timeout_s: float = 3600) -> None:
        """Wait until `/readyz` answers 200, telling each deployment as it becomes ready.

        Raises:
            ServeAppError: a deployment failed, or the time is up.
        """
        names = [entry["name"] for entry in self._file["applications"]]
        Readiness(names, self.url or None, self._needs, self._say).wait(timeout_s)

    def stop(self) -> None:
        """Take the applications down; end Ray too where it was started here."""
        if not ray.is_initialized():
            return
        if self._own_ray:
            # Ray's processes all end with it, so the applications need no farewell of their own, but jobs do:
            # the dispatcher hands its leases back when it is deleted.
            with suppress(RayServeException):  # refused before Serve started
                serve.delete("gateway")
        else:
            serve.shutdown()
        ray.shutdown()


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
