"""serve_app on a cluster of several hosts, run and asked from outside of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from cluster.dev import Cluster
from tests.support.plain_http import http

REPOSITORY = Path(__file__).parent.parent.parent

# By Ray's own limits a host that falls silent counts as dead after more than a minute, here after a few seconds.
QUICK = {"health_check_period_ms": 500, "health_check_timeout_ms": 1500, "health_check_failure_threshold": 4}


def write_config(folder: Path, checkpoint: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """Write configs/tiny.yaml on the random checkpoint, small, some options changed, reachable from outside."""
    content = yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text())
    content["http_options"]["host"] = "0.0.0.0"
    args = content["applications"][0]["args"]
    args["home"] = str(folder / "home")
    args["auth"] = {"open": True}
    args["model"].update(path=str(checkpoint), name="random")
    args["defaults"].update(width=64, height=64, num_frames=9, num_inference_steps=6)
    args["limits"]["num_inference_steps"] = 2000
    args["store"] = {"shared_disk": True}
    for section, options in changes.items():
        args.setdefault(section, {}).update(options)
    for application in content["applications"]:
        application["args"] = args
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def ray_processes(cluster: Cluster, host: int) -> set[str]:
    """Return the names of Ray's workers on a host: `ServeReplica:wan:Encoder`, `Rank`, ..."""
    names = set()
    for pid in cluster.nodes[host].pids():
        try:
            title = (psutil.Process(pid).cmdline() or [""])[0]
        except psutil.NoSuchProcess:
            continue
        if title.startswith("ray::"):
            names.add(title.removeprefix("ray::").split(".")[0])
    return names


class Serving:
    """`serve run` of one configuration, in a process outside of the hosts.

    Args:
        cluster: where it runs.
        folder: of the configuration, the log, the database and the videos; all hosts see it.
        changes: options by section.
    """

    def __init__(self, cluster: Cluster, folder: Path, checkpoint: Path, changes: dict[str, dict[str, Any]]) -> None:
        config = write_config(folder, checkpoint, changes)
        port = yaml.safe_load(config.read_text())["http_options"]["port"]
        self.folder = folder
        self.url = f"http://{cluster.nodes[0].ip}:{port}"
        self._log = (folder / "serve.log").open("w")
        self.process = subprocess.Popen(
            [Path(sys.executable).parent / "serve", "run", config],
            env=cluster.env,
            cwd=folder,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    @property
    def log(self) -> str:
        """Return what `serve run` printed."""
        return (self.folder / "serve.log").read_text(errors="replace")

    def wait_ready(self, timeout_s: float = 900) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            assert self.process.poll() is None, self.log[-5000:]
            try:
                if http.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert time.monotonic() < deadline, f"not ready after {timeout_s} s\n{self.log[-5000:]}"
            time.sleep(0.3)

    def create(self, **fields: Any) -> dict[str, Any]:
        """Create a job."""
        answer = http.post(f"{self.url}/v1/videos", json={"prompt": "a star", **fields}, timeout=30)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def wait(self, video: dict[str, Any], timeout_s: float = 120) -> dict[str, Any]:
        """Return the job once it has ended in any way; a server that does not answer is asked again."""
        deadline = time.monotonic() + timeout_s
        while video["status"] not in ("completed", "failed"):
            assert time.monotonic() < deadline, f"{video}\n{self.log[-5000:]}"
            time.sleep(0.1)
            try:
                answer = http.get(f"{self.url}/v1/videos/{video['id']}", timeout=10)
            except httpx.HTTPError:
                continue
            if answer.status_code == 200:
                video = answer.json()
        return video

    def stop(self) -> None:
        """Send Ctrl-C, which takes the applications down."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:  # the hosts that it waits for may be gone
                self.process.kill()
                self.process.wait()
        self._log.close()
