"""A tiny deployment on a real Ray cluster, started as its users do: `ray start` and `serve run`."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import ray
import yaml

from tests.support.plain_http import http
from tests.support.ports import free_port

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parent.parent.parent


def write_config(folder: Path, checkpoint: Path, port: int) -> Path:
    """Write configs/tiny.yaml for the random checkpoint, small and with its own home."""
    content = yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text())
    content["http_options"]["port"] = port
    args = content["applications"][0]["args"]
    args["home"] = str(folder / "home")
    args["model"].update(path=str(checkpoint), name="random")
    args["defaults"].update(width=64, height=64, num_frames=9, num_inference_steps=6)
    args["limits"]["num_inference_steps"] = 2000
    for application in content["applications"]:
        application["args"] = args
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def wait_ready(url: str, process: subprocess.Popen, timeout_s: float = 900) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            if http.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"not ready after {timeout_s} s")


def end(process: subprocess.Popen, how: int = signal.SIGINT, timeout_s: float = 180) -> list[psutil.Process]:
    """Signal a process and wait for its end. Return, and kill, descendants that are left."""
    if process.poll() is not None:
        return []
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(how)
    process.wait(timeout_s)
    _, left = psutil.wait_procs(family, timeout=20)
    for one in left:
        one.kill()
    return left


@dataclass
class Deployment:
    """A running deployment.

    Attributes:
        url: that of its API.
        environment: variables with which Ray's commands reach its cluster.
        dashboard: URL of Ray's dashboard.
        metrics: host and port of the metrics of its only node.
        config: the file that it serves.
    """

    url: str
    environment: dict[str, str]
    dashboard: str
    metrics: str
    config: Path


@pytest.fixture(scope="module")
def deployment(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """`serve run` on a dev cluster that was started by `ray start`."""
    with deployed(checkpoint, tmp_path_factory.mktemp("deployment")) as deployment:
        yield deployment


@contextmanager
def deployed(checkpoint: Path, folder: Path) -> Iterator[Deployment]:
    """Run a deployment of a checkpoint, with its data and logs in a folder."""
    port, dashboard, api = free_port(), free_port(), free_port()
    environment = {**os.environ, "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}", "PYTHONUNBUFFERED": "1"}
    environment.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16))
    environment["RAY_metrics_report_interval_ms"] = "4000"
    metrics = free_port()
    config = write_config(folder, checkpoint, api)
    with (folder / "ray.log").open("w") as log:
        options = {
            "port": port,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
            "metrics-export-port": metrics,
            "num-cpus": 8,
            "temp-dir": f"/tmp/ray-{port}",  # short: the path of a socket may have 107 characters
        }
        head = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())],
            env={k: v for k, v in environment.items() if k != "RAY_ADDRESS"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        server = None
        try:
            deadline = time.monotonic() + 300
            while "will now block forever" not in (folder / "ray.log").read_text():
                time.sleep(0.1)
                assert head.poll() is None and time.monotonic() < deadline, (folder / "ray.log").read_text()
            server = subprocess.Popen(
                [BIN / "serve", "run", config], env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT
            )
            url = f"http://127.0.0.1:{api}"
            wait_ready(url, server)
            node = environment["RAY_ADDRESS"].partition(":")[0]
            yield Deployment(url, environment, f"http://127.0.0.1:{dashboard}", f"{node}:{metrics}", config)
        except AssertionError:
            print((folder / "ray.log").read_text()[-5000:])
            raise
        finally:
            if server is not None:
                end(server)
            assert not end(head, signal.SIGTERM)
