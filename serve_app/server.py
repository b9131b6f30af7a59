"""A server of one configuration: brought up on this machine's Ray or on one of its own, and taken down again."""

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
from typing import NoReturn

import ray
from ray import serve
from ray.exceptions import RayTaskError

from serve_app.config import Config, load_file
from serve_app.errors import ConfigError, ServeAppError
from serve_app.launch import claim, guard
from serve_app.launch.address import base_url
from serve_app.launch.applications import Applications
from serve_app.launch.gpu_fit import cards_here, cards_of, check_gpus
from serve_app.launch.preflight import preflight
from serve_app.launch.ray_session import RaySession
from serve_app.launch.startup import Startup
from serve_app.launch.targets import build, serve_options, where_data_goes
from serve_app.model import departures, makes_videos, open_model
from serve_app.replica import alive_hosts, check_hosts
from serve_app.shortage import hosts, refuse_the_impossible

Say = Callable[[str], None]

# A server checks this often that its applications are still its own.
_WATCH_S = 2
_ANSWER_S = 30


class Server:
    """A deployment of one YAML file. As a context manager it is up inside the block and gone after it.

    Args:
        path: the file.
        port: HTTP port, instead of the file's.
        own_ray: start a Ray even if one is running, and leave the running one alone.
        replace: first end the server that runs here, instead of refusing to start.
        dashboard: run the dashboard of a Ray that is started here (`serve status` needs it).
        say: called with a line on each thing that happens.

    Attributes:
        config: the configuration of the file.
        url: the gateway's URL on this machine; empty if it answers no HTTP.

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
        self._http = {**self._file["http_options"], **({"port": port} if port else {})}
        self._say = say
        self._replace = replace
        self._built = build(path, self._file, self.config)
        self._runtime_env = self._built.runtime_env
        routes = self._built.gateways
        reached = routes and self._file.get("proxy_location") != "Disabled"
        self.url = base_url(self._http, routes[0]) if reached else ""
        names = [entry["name"] for entry in self._file["applications"]]
        self._ray = RaySession(
            claim.describe(names, str(path.absolute()), self.url),
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
        """Join the running Ray, or start one, and deploy the applications. Returns before they are ready."""
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        for note in (*self._built.notes, where_data_goes(self.config)):
            self._say(note)
        self._applications = Applications(self._built.run)
        self._ray.find(int(self._http.get("port", 8000)))
        if not self._ray.own:
            self._ray.join()
            self._check_serve(self._applications)
        self._check_services()
        if self._ray.own and makes_videos(self._file):
            check_gpus(self.config, cards_here(self.config))
        if self._ray.own:
            self._ray.start()
        check_hosts(self.config, alive_hosts())
        refuse_the_impossible(self._built.needs)
        if makes_videos(self._file):
            check_gpus(self.config, cards_of(hosts()))
        guard.set_stop(guard.Stop.IN_ORDER)
        serve.start(**serve_options({**self._file, "http_options": self._http}))
        if self.config.auth.mode == "none" and self.url:
            who = "anybody who reaches it" if self.config.auth.open else "anybody on this machine"
            self._say(f"auth.mode is none: {who} may use {self.url}")
        self._say(f"loading {self.config.model.name} from {self.config.model.folder}")
        if makes_videos(self._file):
            for line in departures(self.config, open_model(self.config)):
                self._say(line)
        self._applications.deploy()

    def _check_serve(self, applications: Applications) -> None:
        ray_address = self._ray.address
        silent = f"Serve on the Ray at {ray_address} does not answer within {_ANSWER_S} s: end it with `serve shutdown`"
        with guard.deadline(_ANSWER_S, silent):
            was_there = applications.check_free(ray_address, self._http, replace=self._replace)
        for option in ("controller_options", "grpc_options"):
            if was_there and self._file.get(option):
                self._say(f"{option} have no effect: Serve runs already, with those of whoever started it")

    def _check_services(self) -> None:
        """Check the services that the file names, from the host that will use them, and that the port is free."""
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

    def wait_ready(self, timeout_s: float = 3600) -> None:
        """Wait until `/readyz` answers 200, and say which deployment becomes ready.

        Raises:
            ServeAppError: a deployment failed, or the time is up.
        """
        names = [entry["name"] for entry in self._file["applications"]]
        Startup(names, self.url or None, self._built.needs, self._say).wait(timeout_s)

    def watch(self) -> NoReturn:
        """Serve until the process is stopped.

        Raises:
            ServeAppError: Ray or an application is gone, or an application is no longer this server's.
        """
        assert self._applications is not None
        while True:
            time.sleep(_WATCH_S)
            if self._ray.alive():
                self._applications.check_ours()

    def whereabouts(self) -> list[str]:
        """Return lines for people on where everything is."""
        reached = [f"page: {self.url}/, API: {self.url}/docs"] if self.url else []
        return [*reached, where_data_goes(self.config), *self._ray.whereabouts()]

    def stop(self) -> None:
        """Take down the applications of this server, and end Ray too if it was started here."""
        guard.set_stop(guard.Stop.UNDER_WAY)
        if ray.is_initialized() and self._applications is not None and not self._ray.gone:
            # A Ray of our own ends with all its processes, so that most applications need not be deleted first. The
            # dispatcher does: it hands its leases back when it is deleted.
            gateways = {e["name"] for e in self._file["applications"] if e["import_path"] == "serve_app.app:gateway"}
            self._applications.delete(only=gateways if self._ray.own else None)
        self._ray.end()


def _preflight(config: Config) -> list[str]:
    return asyncio.run(preflight(config))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for as long as the block runs."""
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
