"""The three ways to use a server, on real Ray clusters: `serve run`, HTTP, and handle calls from a Ray job."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from cluster.observability.__main__ import FOLDER
from cluster.observability.alerts import ALERTS
from cluster.observability.dashboards import DASHBOARDS
from serve_app.metrics.catalog import METRICS, PRIORITIES
from tests.support.deployed import BIN, REPOSITORY, Deployment, deployment, write_config
from tests.support.load import Load, Seen
from tests.support.plain_http import http
from tests.support.ports import free_port
from tests.support.prometheus import Prometheus, scraping
from tests.support.warm_command import run

__all__ = ["deployment"]

RAYS_LABELS = {"__name__", "Component", "NodeAddress", "WorkerId", "instance", "job"}


@pytest.fixture(scope="module")
def prometheus(
    deployment: Deployment, prometheus_bin: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    with scraping(
        prometheus_bin, tmp_path_factory.mktemp("prometheus"), deployment.metrics, FOLDER / "rules.yml"
    ) as prometheus:
        yield prometheus


def test_metrics_are_exported_from_the_start(prometheus):
    """Counters begin at 0: their first event is an increase, and no panel or alert is empty before it."""
    prometheus.wait('ray_wan_jobs_ended_total{reason="poisonous",priority="batch"} == 0')
    prometheus.wait('ray_wan_jobs_refused_total{reason="queue_full"} == 0')
    prometheus.wait("ray_wan_store_reachable == 1 and on () ray_wan_storage_usable == 1")
    assert {one["metric"]["priority"] for one in prometheus.query("ray_wan_queued_jobs")} == {*PRIORITIES}


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


@pytest.mark.slow
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


def test_doctor_finds_what_is_wrong(deployment: Deployment, tmp_path: Path) -> None:
    content = yaml.safe_load(deployment.config.read_text())
    config = tmp_path / "serve.yaml"

    def doctor(port: int) -> tuple[int, dict[str, str]]:
        content["http_options"]["port"] = port
        config.write_text(yaml.safe_dump(content))
        ended = run("doctor", "--config", config, "--json", environment=deployment.environment, timeout_s=300)
        found = json.loads(ended.stdout)["findings"]
        return ended.returncode, {one["check"]: one["level"] for one in found if one["check"] != "disk"}

    well = dict.fromkeys(
        ("database", "storage", "broker", "gateway", "applications", "clocks", "versions", "gpus", "weights"), "ok"
    )
    assert doctor(content["http_options"]["port"])[1] == well
    assert doctor(1) == (1, {**well, "gateway": "error"})


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        pytest.param({}, ["'gateway' and 'wan' run already", "--replace", "--own-ray"], id="running"),
        pytest.param(
            {"RAY_AUTH_MODE": "disabled"},
            ["asks for its token", "RAY_AUTH_MODE=token"],
            id="no token",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"RAY_AUTH_TOKEN": "0" * 32},
            ["asks for its token", "RAY_AUTH_TOKEN"],
            id="another token",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_up_on_a_cluster_that_serves_already_is_one_line(deployment, checkpoint, tmp_path, variables, said):
    config = write_config(tmp_path, checkpoint, free_port())
    done = subprocess.run(
        [BIN / "wan-serve", "up", config],
        env={**deployment.environment, **variables},  # of which Ray keeps what it has read once
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    for part in (*said, deployment.environment["RAY_ADDRESS"]):
        assert part in done.stderr
    assert http.get(f"{deployment.url}/readyz").status_code == 200


def test_metrics_say_what_was_done(deployment, prometheus):
    """Numbers that a real Prometheus has scraped are those that the API tells of the same jobs."""
    load = Load(deployment.url)
    load.make()
    steps = sum(video["steps"] for video in load.completed)
    most = max(video["steps"] for video in load.completed)
    prometheus.wait(f"{Seen.ENDED} == {load.ended} and on () {Seen.STEPS} >= {most}")
    seen = Seen.of(prometheus)
    assert (seen.created, seen.refused, seen.ended) == (load.created, load.refused, load.ended)
    assert (seen.completed, seen.waits) == (len(load.completed), load.begun)
    for stage, seconds in seen.stages.items():
        assert seconds == pytest.approx(sum(video["timings"].get(stage, 0.0) for video in load.completed)), stage
    assert most <= seen.steps < steps + 2000 and seen.step_s > 0


def test_every_metric_is_found_with_a_sane_value(prometheus, tmp_path):
    for metric in METRICS:
        for series in metric.series:
            found = prometheus.wait(f"ray_{series}")
            assert all(float(one["value"][1]) >= 0 for one in found), series
            labels = {*metric.labels, *(["le"] if series.endswith("_bucket") else [])}
            assert all({*one["metric"]} == labels | RAYS_LABELS for one in found), found[0]
    memory = prometheus.query('ray_wan_rank_memory_bytes{component="process"}')
    assert memory and all(float(one["value"][1]) > 50 * 2**20 for one in memory)
    disk = shutil.disk_usage(tmp_path)
    assert 0 < prometheus.value("max(ray_wan_free_storage_bytes)") <= disk.total
    assert prometheus.value("max(ray_wan_oldest_wait_seconds)") < 600


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.uid)
def test_every_panel_has_data(prometheus, board):
    for panel in board.panels:
        for target in panel.targets:
            if not target.gpu:
                prometheus.wait(target.expression.replace("$__rate_interval", "2m"), 30)


def test_no_alert_fires_on_a_service_that_is_well(prometheus):
    """Rules are evaluated by the real Prometheus, and none has failed to be."""
    groups = prometheus.rules()
    assert {rule["name"] for rule in groups} == {alert.name for alert in ALERTS}
    assert {rule["health"] for rule in groups} == {"ok"}
    firing = {rule["name"] for rule in groups if rule["state"] == "firing"}
    assert not firing


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
