"""The three ways to use a server, on real Ray clusters: `serve run`, HTTP, and handle calls from a Ray job."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray
import yaml

from tests.support.plain_http import http
from tests.support.warm_command import run

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    url: str
    environment: dict[str, str]
    dashboard: str


@pytest.fixture(scope="module")
def deployment(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """`serve run` on a dev cluster that was started by `ray start`."""
    folder = tmp_path_factory.mktemp("deployment")
    port, dashboard, http = free_port(), free_port(), free_port()
    environment = {**os.environ, "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}", "PYTHONUNBUFFERED": "1"}
    environment.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16))
    config = write_config(folder, checkpoint, http)
    with (folder / "ray.log").open("w") as log:
        options = {
            "port": port,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": free_port(),
            "ray-client-server-port": free_port(),
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
            url = f"http://127.0.0.1:{http}"
            wait_ready(url, server)
            yield Deployment(url, environment, f"http://127.0.0.1:{dashboard}")
        except AssertionError:
            print((folder / "ray.log").read_text()[-5000:])
            raise
        finally:
            if server is not None:
                end(server)
            assert not end(head, signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_openai_sdk_creates_polls_lists_downloads_and_deletes(deployment, tmp_path):
    client: Any = openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0)
    video = client.videos.create_and_poll(prompt="一个红色的圆", size="64x48", extra_body={"seed": 7, "num_frames": 5})
    assert video.status == "completed" and video.progress == 100 and video.size == "64x48"
    assert video.model_extra["seed"] == 7 and video.model_extra["timings"]["denoise"] > 0
    assert len(video.model_extra["revision"]) == 12
    assert video.id in [listed.id for listed in client.videos.list(limit=5)]
    client.videos.download_content(video.id).write_to_file(tmp_path / "video.mp4")
    from serve_app.wan.video import read_metadata

    assert read_metadata(tmp_path / "video.mp4")["prompt"] == "一个红色的圆"
    for variant in ("thumbnail", "spritesheet"):
        assert client.videos.download_content(video.id, variant=variant).content[:3] == b"\xff\xd8\xff"
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="odd", size="63x48")
    assert refused.value.param in ("width", "size")


def test_progress_over_http_is_true(deployment):
    with httpx.Client(base_url=deployment.url) as http:
        video = http.post("/v1/videos", json={"prompt": "a star", "num_inference_steps": 100}).json()
        seen = []
        while video["status"] not in ("completed", "failed"):
            video = http.get(f"/v1/videos/{video['id']}").json()
            seen.append((video["progress"], video.get("stage"), video.get("step")))
        assert video["status"] == "completed", video
    assert seen == sorted(seen, key=lambda entry: entry[0])
    steps = {step for _, stage, step in seen if stage == "denoise"}
    assert len(steps) > 3, f"progress jumped: {seen}"


def test_hints_of_clients_to_the_proxy_are_ignored(deployment):
    for hints in ({"x-request-timeout-seconds": "0.0001"}, {"x-request-disconnect-disabled": "?1"}):
        assert http.get(f"{deployment.url}/v1/videos", headers=hints).status_code == 200


def test_a_job_outlives_the_death_of_a_rank(deployment):
    with httpx.Client(base_url=deployment.url) as http:
        video = http.post("/v1/videos", json={"prompt": "a star", "num_inference_steps": 400, "seed": 9}).json()
        while not (video["stage"] == "denoise" and video["step"] > 1):
            video = http.get(f"/v1/videos/{video['id']}").json()
            assert video["status"] != "failed", video
        killed = [
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if (process.info["cmdline"] or [""])[0].startswith("ray::Rank")
            and deployment.environment["RAY_ADDRESS"].partition(":")[2] in " ".join(_ray_command(process))
        ]
        assert len(killed) == 1
        killed[0].kill()
        while video["status"] not in ("completed", "failed"):
            time.sleep(0.1)
            video = http.get(f"/v1/videos/{video['id']}", timeout=30).json()
        # The second attempt may still meet the replica that is going.
        assert video["status"] == "completed" and 2 <= video["attempts"] <= 3, video


def _ray_command(process: psutil.Process) -> list[str]:
    """Return the command line of the raylet that started a worker. It names the cluster's address."""
    parent = process.parent()
    return parent.cmdline() if parent is not None else []


def test_handle_calls_from_another_ray_job(deployment, tmp_path):
    done = subprocess.run(
        [
            *(BIN / "ray", "job", "submit", "--address", deployment.dashboard),
            *("--", sys.executable, REPOSITORY / "tests/support/ray_job.py", tmp_path / "out.mp4"),
        ],
        env=deployment.environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 and "all handle calls work" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "out.mp4").stat().st_size > 0


def test_generate_follows_a_running_server(deployment, tmp_path):
    out = tmp_path / "out.mp4"
    command = [BIN / "wan-serve", "generate", "a red circle", "-o", out, "--url", deployment.url, "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "seed 3" in done.stdout and out.stat().st_size > 0, done.stdout + done.stderr
    refused = subprocess.run([*command, "--frames", "6"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "'num_frames' is 6" in refused.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, ["'gateway' and 'wan' run already", "--replace", "--own-ray"]),
        ({"RAY_AUTH_MODE": "disabled"}, ["asks for its token", "RAY_AUTH_MODE=token"]),
        ({"RAY_AUTH_TOKEN": "0" * 32}, ["asks for its token", "RAY_AUTH_TOKEN"]),
    ],
    ids=["running", "no token", "another token"],
)
def test_up_on_a_cluster_that_serves_already_is_one_line(deployment, checkpoint, tmp_path, variables, said):
    config = write_config(tmp_path, checkpoint, free_port())
    done = run("up", config, environment={**deployment.environment, **variables})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    for part in (*said, deployment.environment["RAY_ADDRESS"]):
        assert part in done.stderr
    assert http.get(f"{deployment.url}/readyz").status_code == 200


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["applications"][0]["args"]["denoiser"].update(tensor_paralel=2), "denoiser.tensor_paralel"),
        (lambda c: c["applications"][0].update(route_prefx="/"), "route_prefx"),
        (lambda c: c.update(proxy_locations="HeadOnly"), "proxy_locations"),
        (lambda c: c["applications"][0]["args"]["model"].update(path="/nowhere"), "/nowhere"),
        (lambda c: c["applications"][0]["args"]["denoiser"].update(parallel={"tensor": 3}), "denoiser.parallel.tensor"),
    ],
    ids=["option", "application key", "file key", "folder", "heads"],
)
def test_a_wrong_file_is_one_line_and_starts_nothing(checkpoint, tmp_path, change, said):
    path = write_config(tmp_path, checkpoint, free_port())
    content = yaml.safe_load(path.read_text())
    change(content)
    for application in content["applications"]:
        application["args"] = content["applications"][0]["args"]
    path.write_text(yaml.safe_dump(content))
    done = run("up", path, "--own-ray")
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "starting Ray" not in done.stdout
