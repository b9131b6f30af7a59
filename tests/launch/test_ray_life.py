"""`wan-serve up` with real Rays: the Ray that it finds, its lines, and that it leaves nothing after a signal."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray

from tests.support.deployed import BIN, REPOSITORY, end, wait_ready, write_config
from tests.support.ports import free_port

ENDS_WITHIN_S = 60


class Up:
    """A `wan-serve up`, its output in a file, and all processes that descend from it."""

    def __init__(self, folder: Path, config: Path, *options: str, **environment: str) -> None:
        self.log = folder / "up.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [BIN / "wan-serve", "up", config, *options],
                env={**bare_environment(folder), **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str, timeout_s: float = 600) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in self.said:
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def bare_environment(folder: Path) -> dict[str, str]:
    """The environment of a shell in which nothing is set for Ray, with a folder for Ray's files.

    The folder's path is short, since the path of a socket may have 107 characters.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": f"/tmp/life-{os.getpid()}", "PYTHONUNBUFFERED": "1"}


def gone(processes: list[psutil.Process], timeout_s: float = ENDS_WITHIN_S) -> bool:
    _, left = psutil.wait_procs(processes, timeout=timeout_s)
    for one in left:
        one.kill()
    return not left


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, checkpoint, free_port())


def run(config: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "wan-serve", "up", config, *options],
        env={**bare_environment(config.parent), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_up_on_a_ray_of_its_own(config, tmp_path):
    """It says what another shell needs; a second one finds it; SIGTERM, twice, leaves nothing."""
    port = free_port()
    up = Up(tmp_path, config, "--own-ray", "--port", str(port), RAY_ADDRESS="127.0.0.1:1")
    try:
        up.wait_for("ready on")
        wait_ready(f"http://127.0.0.1:{port}", up.process)
        assert str(tmp_path / "home") in up.said and f"http://127.0.0.1:{port}/docs" in up.said

        words = shlex.split(re.search(r"export (.*)", up.said)[1])
        exports = {name: value for name, _, value in (word.partition("=") for word in words)}
        second = run(config, **exports)
        assert second.returncode == 1 and second.stderr.count("\n") == 1, second.stderr
        for part in ("'wan' and 'gateway'", f"http://127.0.0.1:{port}", f"pid {up.process.pid}", "--replace"):
            assert part in second.stderr
        assert "starting Ray" not in second.stdout

        # As another shell would, elsewhere and with another Python in front.
        shell = {**bare_environment(tmp_path), "PATH": f"/usr/bin:/bin:{BIN}"}
        del shell["PYTHONPATH"]
        running = [
            subprocess.Popen(
                [BIN / program, *arguments],
                env={**shell, **exports},
                cwd="/",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for program, *arguments in (
                ("ray", "status"),
                ("serve", "status"),
                ("wan-serve", "status", "--json"),
                ("ray", "job", "submit", "--", "python", "-c", "import serve_app; print('in', serve_app.__file__)"),
            )
        ]
        said = [command.communicate(timeout=240)[0] for command in running]
        assert [command.returncode for command in running] == [0, 0, 0, 0], said
        assert f"in {REPOSITORY}" in said[-1]
        assert '"Denoiser"' in said[2] and '"seconds_waiting": null' in said[2]

        family = up.family()
        up.process.terminate()
        up.process.terminate()
        assert up.process.wait(ENDS_WITHIN_S) == 143
        assert gone(family, 5)
        assert up.said.strip().splitlines()[-1].startswith("ready on")  # no backtrace after it
    finally:
        end(up.process, signal.SIGKILL)


# What has been said when the blow comes, how it comes, and the status of who was hit.
MOMENTS = {
    "imports": ("", "up", signal.SIGTERM, 143),
    "start of Ray": ("starting Ray", "up", signal.SIGHUP, 129),
    "loading": ("loading", "up", signal.SIGTERM, 143),
    "ready, Ctrl-C": ("ready on", "up", signal.SIGINT, 130),
    "start of Ray, killed": ("starting Ray", "up", signal.SIGKILL, -9),
    "loading, killed": ("loading", "up", signal.SIGKILL, -9),
    "ready, its child killed": ("ready on", "child", signal.SIGKILL, 137),
    "ready, Ray killed": ("ready on", "gcs_server", signal.SIGKILL, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "whom", "how", "status"), MOMENTS.values(), ids=MOMENTS.keys())
def test_nothing_is_left_whenever_it_is_ended(config, tmp_path, moment, whom, how, status):
    up = Up(tmp_path, config, "--own-ray")
    up.wait_for(moment)
    time.sleep(1)
    family = up.family()
    hit = {"up": up.process.pid, "child": family[0].pid}.get(whom)
    psutil.Process(hit or next(one.pid for one in family if one.name() == whom)).send_signal(how)
    assert up.process.wait(ENDS_WITHIN_S) == status
    assert gone(family)
    assert "Traceback" not in up.said and "***" not in up.said


@dataclass
class Head:
    process: subprocess.Popen
    environment: dict[str, str]


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[Head]:
    """A Ray that `ray start` has started, and what its commands need."""
    environment = {**bare_environment(tmp_path), "RAY_AUTH_MODE": "disabled"}
    Path(environment["RAY_TMPDIR"]).mkdir(exist_ok=True)
    port, agent, client = free_port(), free_port(), free_port()
    options = [f"--port={port}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    log = tmp_path / "ray.log"
    with log.open("w") as out:
        head = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", "--num-cpus=8", "--include-dashboard=false", *options],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 300
        while "will now block forever" not in log.read_text():
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Head(head, {**environment, "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"})
    finally:
        end(head, signal.SIGTERM)


def python(environment: dict[str, str], code: str) -> str:
    code = f"import ray\nfrom ray import serve\nray.init(address='auto', namespace='serve')\n{code}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


OTHER = """
@serve.deployment(ray_actor_options={"num_cpus": 0})
class Other: pass
serve.start(http_options={"port": %d}, proxy_location="HeadOnly")
serve.run(Other.bind(), name="other", route_prefix="/other")
"""
NAMES = "print(sorted(serve.status().applications))"


@pytest.mark.slow
def test_up_on_a_ray_of_others(ray_head, config, tmp_path):
    """It refuses another port, ends its own applications only, notices that they went away, and gives up on a hang."""
    port, environment = free_port(), ray_head.environment
    joins = {name: environment[name] for name in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    python(environment, OTHER % port)
    refused = run(config, **joins)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
    assert f"expected {port}" in refused.stderr and "--own-ray" in refused.stderr

    up = Up(tmp_path, config, "--port", str(port), **joins)
    up.wait_for("ready on")
    assert python(environment, NAMES) == "['gateway', 'other', 'wan']\n"
    up.process.terminate()
    assert up.process.wait(ENDS_WITHIN_S) == 143, up.said
    assert python(environment, NAMES) == "['other']\n"

    up = Up(tmp_path, config, "--port", str(port), **joins)
    up.wait_for("ready on")
    python(environment, "serve.delete('gateway')")
    assert up.process.wait(ENDS_WITHIN_S) == 1
    assert "wan-serve: application 'gateway' was deleted by somebody else" in up.said
    assert python(environment, NAMES) == "['other']\n"

    control = next(p for p in psutil.Process(ray_head.process.pid).children() if p.name() == "gcs_server")
    control.suspend()
    try:
        hung = run(config, **joins)
    finally:
        control.resume()
    assert hung.returncode == 1 and hung.stderr.count("\n") == 1, hung.stderr
    assert "does not answer" in hung.stderr and "ray stop" in hung.stderr
