"""A cluster of several hosts on this machine: brought up, given faults, repaired and taken down."""

from __future__ import annotations

import dataclasses
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any

from cluster.dev import processes
from cluster.dev.errors import ClusterError, bad_option
from cluster.dev.host import Host
from cluster.dev.loopback import MARK
from cluster.dev.namespaces import REDIS, Namespaces, missing
from cluster.dev.options import plan
from cluster.dev.state import load
from cluster.dev.teardown import is_up, network_of, take_down
from cluster.dev.view import RayNode, ask

Say = Callable[[str], None]


class Cluster:
    """Several hosts with a Ray node each. As a context manager it is up inside the block and gone after it.

    Args:
        nodes: number of hosts; host 0 is the head.
        name: 1 to 8 small letters and digits, unique on this machine; None makes one up.
        cpus: CPUs that each host declares to Ray, or a mapping from host to CPUs.
        gpus: the same for GPUs.
        labels: Ray node labels by host.
        resources: custom resources by host.
        redis: HOST:PORT of a Redis that keeps the control process's state, or `auto` to start one.
        dashboard: run Ray's dashboard on host 0, port 8265 (`serve deploy` and the jobs API need it).
        loopback: True forces the fallback without namespaces, None takes it if they are missing.
        object_store_mb: size of Ray's object store on each host, in MB.
        config: Ray's internal options (`health_check_period_ms`, ...), the same everywhere.
        detached: the cluster outlives this process.
        say: called with a line on each thing that happens.

    Raises:
        ClusterError: an option cannot work. Nothing has been started then.
    """

    def __init__(
        self,
        nodes: int = 3,
        *,
        name: str | None = None,
        cpus: int | Mapping[int, int] = 4,
        gpus: int | Mapping[int, int] = 0,
        labels: Mapping[int, Mapping[str, str]] | None = None,
        resources: Mapping[int, Mapping[str, float]] | None = None,
        redis: str | None = None,
        dashboard: bool = False,
        loopback: bool | None = None,
        object_store_mb: int = 256,
        config: Mapping[str, Any] | None = None,
        detached: bool = False,
        say: Say = lambda line: None,
    ) -> None:
        self._say = say
        self.begun = False
        """True if `up` may have made anything."""
        self.state = plan(
            nodes,
            name=f"x{secrets.token_hex(3)}" if name is None else name,
            cpus=cpus,
            gpus=gpus,
            labels=labels or {},
            resources=resources or {},
            redis=redis,
            dashboard=dashboard,
            loopback=loopback,
            object_store_mb=object_store_mb,
            config=config or {},
            owned=not detached,
        )
        self.network = network_of(self.state)
        if self.state.loopback:
            why = "" if loopback else f" because network namespaces are missing ({missing()})"
            say(f"{self.name}: on loopback{why}: {self.network.limits}")

    @classmethod
    def attach(cls, name: str, say: Say = lambda line: None) -> Cluster:
        """Return the cluster of that name, brought up by some process.

        Args:
            name: the cluster's name.
            say: called with a line on each thing that happens.

        Raises:
            ClusterError: there is none.
        """
        cluster = cls.__new__(cls)
        cluster.state = load(name)
        cluster.network = network_of(cluster.state)
        cluster._say = say
        cluster.begun = True
        return cluster

    def __enter__(self) -> Cluster:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    @property
    def name(self) -> str:
        """The cluster's name, by which other shells find it."""
        return self.state.name

    @property
    def exists(self) -> bool:
        """True if nobody has taken the cluster down."""
        try:
            return load(self.name).token == self.state.token
        except ClusterError:
            return False

    @property
    def nodes(self) -> list[Host]:
        """The hosts; 0 is the head."""
        return [Host(self.network, index, spec) for index, spec in enumerate(self.state.hosts)]

    @property
    def address(self) -> str:
        """The host:port of the control process."""
        return f"{self.network.ip('0')}:{self.state.port}"

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that a client needs."""
        return processes.variables(self.state, self.address)

    @property
    def env(self) -> dict[str, str]:
        """A whole environment for clients: that of this process, and `variables`."""
        return {**os.environ, **self.variables}

    def up(self) -> None:
        """Make the hosts and start Ray on each. Returns when all are registered.

        Raises:
            ClusterError: a cluster of that name is up, or something did not start. Nothing is left then.
        """
        if is_up(self.name):
            raise ClusterError(f"name has value {self.name!r}, expected one that is not in use: `down` takes it down")
        take_down(self.name)  # what a killed run may have left
        self.begun = True
        try:
            self._up()
        except BaseException:
            self.down()
            raise

    def _up(self) -> None:
        self.state.save()
        keys = [str(host.index) for host in self.nodes]
        self._say(f"{self.name}: making {len(keys)} hosts")
        self.network.create([*keys, *([REDIS] if self.state.own_redis else [])])
        if self.state.own_redis and isinstance(self.network, Namespaces):
            self.state = dataclasses.replace(self.state, redis=f"{self.network.ip(REDIS)}:6379")
            self.state.save()
            processes.start_redis(self.state, self.network, 6379)
            self._say(f"redis at {self.state.redis}")
        self._start(0)
        processes.remember_control(self.state, self.nodes[0].pids())
        self._start(*range(1, len(keys)))

    def down(self) -> None:
        """Kill every process of every host, and remove all that `up` made. Does nothing if nothing is left."""
        killed = take_down(self.name)
        self._say(f"{self.name}: is down, {killed} processes ended")

    def kill(self, host: int) -> None:
        """SIGKILL every process of a host at once, as when its power fails. Its files and its address stay."""
        killed = processes.kill_all(self._host(host).pids)
        self._say(f"host {host}: {killed} processes killed")

    def cut(self, host: int, seconds: float | None = None) -> None:
        """Take a host's link down. Its processes go on, but reach no other host and are not reached.

        Args:
            host: the host's number.
            seconds: wait so long and put the link up again; None leaves it down until `join`.
        """
        key = str(self._host(host).index)
        self.network.set_link(key, False)
        self._say(f"host {host}: is cut off")
        if seconds is not None:
            try:
                time.sleep(seconds)
            finally:
                self.network.set_link(key, True)
            self._say(f"host {host}: is connected again")

    def kill_control(self) -> None:
        """SIGKILL the control process (gcs_server) of host 0 and nothing else."""
        process = processes.control(self.nodes[0].pids())
        if process is None:
            raise ClusterError("host 0 runs no control process (gcs_server)")
        process.kill()
        processes.kill_all(lambda: [process.pid] if processes.control(self.nodes[0].pids()) == process else [])
        self._say("host 0: control process killed")

    def join(self, host: int, timeout_s: float = 120) -> None:
        """Repair a host: put its link up, start its Ray node if it does not run, and wait until it counts as alive.

        A host that was cut off for too long ends its own Ray node when it hears that it counted as dead. Its Ray node
        is then started again, with the same address.

        Args:
            host: the host's number.
            timeout_s: give up after this time.

        Raises:
            ClusterError: the control process is gone and there is no Redis to restore it from, or the time is up.
        """
        repaired = self._host(host)
        self.network.set_link(str(host), True)
        if host == 0 and processes.control(repaired.pids()) is None:
            if not self.state.redis:
                raise ClusterError("host 0 lost what its control process knew, expected a cluster with --redis")
            if repaired.runs_ray:
                processes.restart_control(self.state, self.network)
                self._say("host 0: control process started again")
        deadline = time.monotonic() + timeout_s
        while True:
            if not repaired.runs_ray:
                processes.kill_all(
                    repaired.pids
                )  # processes that a dead Ray node left would be in the way of the new one
                self._start(host)
                if host == 0:
                    processes.remember_control(self.state, repaired.pids())
            if any(node.alive and node.host == host for node in self._look(2) or ()):
                return
            if time.monotonic() > deadline:
                raise ClusterError(f"host {host}: is not back after {timeout_s:g} s")

    def view(self, timeout_s: float = 10) -> list[RayNode]:
        """Return the Ray nodes that the control process knows, dead ones included.

        Raises:
            ClusterError: it does not answer.
        """
        found = self._look(timeout_s)
        if found is None:
            raise ClusterError(f"the control process at {self.address} does not answer within {timeout_s:g} s")
        return found

    def wait_alive(self, hosts: Collection[int], timeout_s: float = 120) -> float:
        """Wait until exactly these hosts count as alive.

        Returns:
            The seconds that this took.

        Raises:
            ClusterError: the time is up.
        """
        started = time.monotonic()
        if self._look(timeout_s, hosts) is None:
            raise ClusterError(f"after {timeout_s:g} s others than hosts {sorted(hosts)} are alive: {self._problem}")
        return time.monotonic() - started

    def run(self, host: int, argv: Collection[Any], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Call `subprocess.run` inside a host, with `inner_env`."""
        return subprocess.run(self.inside(host, argv), **{"env": self.inner_env(host), **options})

    def popen(self, host: int, argv: Collection[Any], **options: Any) -> subprocess.Popen[Any]:
        """Call `subprocess.Popen` inside a host, with `inner_env`."""
        return subprocess.Popen(self.inside(host, argv), **{"env": self.inner_env(host), **options})

    def _host(self, host: int) -> Host:
        if host not in range(len(self.state.hosts)):
            raise bad_option("host", host, f"0 to {len(self.state.hosts) - 1}")
        return self.nodes[host]

    def inside(self, host: int, argv: Collection[Any]) -> list[str]:
        """Return the command line that runs `argv` inside a host."""
        return self.network.command(str(self._host(host).index), [str(argument) for argument in argv])

    def inner_env(self, host: int) -> dict[str, str]:
        """Return the whole environment of a process inside a host."""
        return {**self.env, MARK: f"{self.name}/{host}"}

    def _start(self, *hosts: int) -> None:
        """Start Ray on several hosts at the same time."""
        began = time.monotonic()
        starting = {host: processes.start_ray(self.state, self.network, host, self.address) for host in hosts}
        for host, process in starting.items():
            processes.wait_started(self.state, host, process)
            self._say(f"host {host}: Ray runs at {self.nodes[host].ip} after {time.monotonic() - began:.1f} s")

    def _look(self, timeout_s: float, alive: Collection[int] | None = None) -> list[RayNode] | None:
        """Return the control process's nodes, if given once exactly `alive` are alive; None if the time is up."""
        nodes, self._problem = ask(self.address, self.env, timeout_s, alive)
        return nodes
