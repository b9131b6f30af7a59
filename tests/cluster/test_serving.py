"""The server on three hosts: deployed from outside, used by HTTP, with each stage on its chosen host."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.plain_http import http
from tests.support.serving import ray_processes


@pytest.mark.slow
def test_stages_run_on_the_chosen_hosts_and_make_a_video(three_hosts, serve_on):
    serving = serve_on(
        three_hosts,
        encoder={"resources": {"num_cpus": 0.1, "labels": {"pool": "codec"}}},
        decoder={"resources": {"num_cpus": 0.1, "resources": {"codec": 1}}},
        denoiser={"rank": {"num_cpus": 0.2, "labels": {"pool": "denoise"}}},
    )
    video = serving.wait(serving.create(prompt="a red circle", seed=7))
    assert video["status"] == "completed" and video["attempts"] == 1, video
    content = http.get(f"{serving.url}/v1/videos/{video['id']}/content", timeout=30)
    assert content.status_code == 200 and content.content[4:8] == b"ftyp"

    head, denoise, codec = (ray_processes(three_hosts, host) for host in range(3))
    assert {"ServeReplica:wan:Encoder", "ServeReplica:wan:Decoder"} <= codec, codec
    assert {"ServeReplica:wan:Denoiser", "Rank"} <= denoise, denoise
    assert "Rank" not in head | codec
    assert "ServeController" in head

    # The doctor asks all three. Two of them claim GPUs, which this machine may not have.
    doctor = [Path(sys.executable).parent / "wan-serve", "doctor", "--config", serving.folder / "serve.yaml", "--json"]
    ended = three_hosts.run(0, doctor, capture_output=True, text=True, timeout=300)
    found = json.loads(ended.stdout)["findings"]
    said = {one["check"]: one["said"] for one in found if one["level"] == "ok"}
    assert said["clocks"].startswith("3 hosts within"), found
    assert "the same on 3 hosts" in said["weights"] and "the same on 3 hosts" in said["versions"], found
    assert {"database", "storage", "gateway", "applications"} <= set(said), found
    if shutil.which("nvidia-smi") is None:
        claims = {
            f"{three_hosts.nodes[host].ip} shows 0 GPUs, and Ray counts {count}" for host, count in ((1, 1), (2, 2))
        }
        assert {one["said"] for one in found if one["check"] == "gpus"} == claims and ended.returncode == 1
