"""Start and end of the processes inside the hosts: Ray nodes, the control process, a Redis."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.dev.errors import ClusterError
from cluster.dev.loopback import MARK, Loopback, free_ports
from cluster.dev.namespaces import REDIS, Namespaces
from cluster.dev.state import State, write_private

START_TIMEOUT_S = 120
_CONTROL = "gcs_server"


def variables(state: State, address: str) -> dict[str, str]:
    """Return the environment variables that a client needs."""
    dashboard = f"http://{address.rpartition(':')[0]}:{state.dashboard}"
    return {
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": state.token,
        # The first for `serve deploy`, the second for `ray job`.
        **({"RAY_DASHBOARD_ADDRESS": dashboard, "RAY_API_SERVER_ADDRESS": dashboard} if state.dashboard else {}),
        **{f"RAY_{option}": value for option, value in state.config.items()},
    }


def start_ray(state: State, network: Namespaces | Loopback, host: int, address: str) -> subprocess.Popen[bytes]:
    """Begin to start a host's Ray node. `wait_started` waits until it has started."""
    spec, ip = state.hosts[host], network.ip(str(host))
    options: dict[str, object] = {
        "node-ip-address": ip,
        "node-name": host,
        "num-cpus": spec.cpus,
        "num-gpus": spec.gpus,
        "resources": json.dumps(spec.resources),
        "object-store-memory": state.object_store_mb << 20,
        # Each host has its folder: in a shared one, nodes that start at the same time take each other's socket names.
        "temp-dir": state.folder / str(host),
    }
    if spec.labels:
        options["labels"] = ",".join(f"{key}={value}" for key, value in spec.labels.items())
    if host == 0:
        options["port"] = state.port
        options["include-dashboard"] = bool(state.dashboard)
        options["dashboard-host"] = ip
        options["dashboard-port"] = state.dashboard or 8265
    else:
        options["address"] = address
    if state.loopback:  # hosts with an address of their own keep Ray's default ports
        ports = free_ports(2)
        options["dashboard-agent-listen-port"] = ports[0]
        if host == 0:
            options["ray-client-server-port"] = ports[1]
    if host == 0:
        # The file names the cluster of a head that was killed. Ray would take that for running, since it sees the
        # processes of other hosts.
        (state.folder / "0" / "ray_current_cluster").unlink(missing_ok=True)
    argv = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
    argv += [
        *(["--head", "--no-monitor"] if host == 0 else []),
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    environment = {**os.environ, **_ray_environment(state, host, address)}
    environment.pop("RAY_ADDRESS", None)
    with log_path(state, host).open("w") as log:
        # A session of its own: Ctrl-C in the terminal must not reach the hosts' processes.
        return subprocess.Popen(
            network.command(str(host), argv),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _ray_environment(state: State, host: int, address: str) -> dict[str, str]:
    values = {
        # The first driver would start as many workers as there are declared CPUs, on a machine that has fewer.
        "RAY_prestart_worker_first_driver": "0",
        **variables(state, address),
        # A job's `python` is the one that has Ray.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        MARK: f"{state.name}/{host}",
    }
    if host == 0 and state.redis:
        values["RAY_REDIS_ADDRESS"] = state.redis
        values["RAY_external_storage_namespace"] = storage_namespace(state)
    return values


def storage_namespace(state: State) -> str:
    """Return the prefix of the cluster's keys in Redis. A later cluster of the same name has another prefix."""
    return f"{state.name}-{state.token[:8]}"


def wait_started(state: State, host: int, starting: subprocess.Popen[bytes]) -> None:
    """Wait until a host's Ray node is registered.

    Raises:
        ClusterError: it did not start. The message ends with the last lines that it printed.
    """
    try:
        status = starting.wait(START_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ClusterError(f"host {host}: Ray did not start within {START_TIMEOUT_S} s: {_tail(state, host)}") from None
    if status:
        raise ClusterError(f"host {host}: `ray start` ended with {status}: {_tail(state, host)}")


def log_path(state: State, host: int) -> Path:
    """Return the file with the output of `ray start`."""
    return state.folder / f"start-{host}.log"


def _tail(state: State, host: int) -> str:
    lines = [line.strip() for line in log_path(state, host).read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-4:]) or "it printed nothing"


def start_redis(state: State, network: Namespaces, port: int) -> None:
    """Start a Redis that keeps no files, on a host of its own so that it outlives host 0."""
    argv = ["redis-server", "--port", str(port), "--bind", network.ip(REDIS), "--protected-mode", "no"]
    argv += ["--save", "", "--appendonly", "no", "--daemonize", "yes", "--dir", str(state.folder)]
    argv += ["--logfile", str(state.folder / "redis.log")]
    done = subprocess.run(network.command(REDIS, argv), capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"redis-server ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    wait_listening(network.ip(REDIS), port, "redis-server")


def wait_listening(ip: str, port: int, what: str, timeout_s: float = 30) -> None:
    """Wait until a port answers.

    Raises:
        ClusterError: the time is up.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((ip, port), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"{what} does not listen on {ip}:{port} after {timeout_s:g} s: {error}") from None
        time.sleep(0.05)


def remember_control(state: State, pids: list[int]) -> None:
    """Note how the control process was started, for `restart_control`."""
    process = control(pids)
    if process is None:
        raise ClusterError("host 0 runs no control process (gcs_server)")
    content = {"argv": process.cmdline(), "environment": process.environ(), "cwd": process.cwd()}
    write_private(state.folder / "control.json", json.dumps(content))


def restart_control(state: State, network: Namespaces | Loopback) -> None:
    """Start the control process again, with its old command line and environment."""
    old = json.loads((state.folder / "control.json").read_text())
    subprocess.Popen(
        network.command("0", old["argv"]),
        env=old["environment"],
        cwd=old["cwd"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # it writes to the files that its command line names
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_listening(network.ip("0"), state.port, "the control process")


def control(pids: list[int]) -> psutil.Process | None:
    """Return the control process (gcs_server) among these processes; None if it is not there."""
    return _find(pids, _CONTROL)


def raylet(pids: list[int]) -> psutil.Process | None:
    """Return the raylet among these processes, which makes a host a Ray node; None if it is not there."""
    return _find(pids, "raylet")


def _find(pids: list[int], executable: str) -> psutil.Process | None:
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if Path((process.cmdline() or [""])[0]).name == executable and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def kill_all(pids: Callable[[], list[int]], timeout_s: float = 30) -> int:
    """SIGKILL processes, and those that they start meanwhile, until none is left.

    Args:
        pids: returns the processes that are left.
        timeout_s: give up after this time.

    Returns:
        The number of processes killed.

    Raises:
        ClusterError: some do not end.
    """
    seen: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while left := pids():
        if time.monotonic() > deadline:
            raise ClusterError(f"processes {left} do not end")
        seen.update(left)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    return len(seen)
