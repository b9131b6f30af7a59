"""The server on three hosts: deployed from outside, used by HTTP, with each stage on its chosen host."""

from __future__ import annotations

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
