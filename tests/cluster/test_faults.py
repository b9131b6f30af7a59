"""Everything that can be lost between hosts is lost once during a job, which goes on and makes the same video."""

from __future__ import annotations

import io
import os
import random
import threading
import time
from typing import Any

import av
import httpx
import numpy as np
import psutil
import pytest

from benchmarks.faults.strikes import FAULTS, find, strike
from cluster.dev import Cluster
from tests.support.plain_http import http
from tests.support.serving import QUICK, Serving

pytestmark = pytest.mark.slow
JOB = {"prompt": "a red circle", "seed": 3, "num_inference_steps": 400}
RANKS = {"labels": {"pool": "gpu"}, "num_cpus": 0.2}


@pytest.fixture(scope="module")
def cluster(namespaces, redis_server):
    """A head, and two hosts of which either can hold the group."""
    with Cluster(
        3, cpus=8, labels={1: {"pool": "gpu"}, 2: {"pool": "gpu"}}, redis="auto", config=QUICK, say=print
    ) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def serving(cluster, serve_on) -> Serving:
    """A deployment with a group of one rank: faults of larger groups need no hosts and are in tests/stages."""
    return serve_on(
        cluster,
        denoiser={
            "threads": 1,
            "rank": RANKS,
            "checkpoint_s": 0.5,
            "samples_per_step": 1,
            "health_check_timeout_s": 10,
        },
        dispatcher={"lease_s": 6, "retry_s": 1},
    )


@pytest.fixture(scope="module")
def undisturbed(serving) -> bytes:
    return pixels(content(serving, serving.wait(serving.create(**JOB))))


def content(serving: Serving, video: dict[str, Any]) -> bytes:
    assert video["status"] == "completed", video
    return http.get(f"{serving.url}/v1/videos/{video['id']}/content", timeout=30).raise_for_status().content


def pixels(file: bytes) -> bytes:
    """Return the compressed frames of a video, without the metadata, which names the job."""
    with av.open(io.BytesIO(file)) as container:
        return b"".join(bytes(packet) for packet in container.demux(video=0))


def frames(file: bytes) -> np.ndarray:
    with av.open(io.BytesIO(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def status(serving: Serving, video: dict[str, Any]) -> dict[str, Any]:
    while True:
        try:
            answer = http.get(f"{serving.url}/v1/videos/{video['id']}", timeout=10)
            if answer.status_code == 200:
                return answer.json()
        except httpx.HTTPError:
            pass
        time.sleep(0.05)


# Ranks that die or hang, and a pipeline that dies, are in tests/stages: they need no hosts.
@pytest.mark.parametrize(
    "fault",
    [
        "coordinator killed",
        "dispatcher killed",
        "host of ranks killed",
        "link of ranks' host down",
        "control process killed",
    ],
)
def test_a_job_survives_and_its_video_is_the_same(cluster, serving, undisturbed, fault):
    video = serving.create(**JOB)
    while (now := status(serving, video))["stage"] != "denoise" or now["step"] < 60:
        time.sleep(0.1)
    before = dict(find(cluster, "Rank"))
    hit = strike(fault, cluster, random.Random(0))
    mend = FAULTS[fault].mend
    mender = threading.Timer(FAULTS[fault].after_s, mend, (cluster, hit)) if mend else None
    if mender:
        mender.start()
    done = serving.wait(video, 180)
    if mender:
        mender.join()
    assert pixels(content(serving, done)) == undisturbed
    kept = [path.name for path in (serving.folder / "home/videos/videos" / video["id"]).iterdir()]
    assert kept == [str(done["attempts"])], "a second video is left"
    assert done["attempts"] <= 3, done
    cluster.wait_alive(range(3))
    # One group, complete, and nobody left over from before.
    deadline = time.monotonic() + 60
    while len(find(cluster, "Rank")) != 1 or len(find(cluster, "ServeReplica:wan:Denoiser")) != 1:
        assert time.monotonic() < deadline, (before, find(cluster, "Rank"))
        time.sleep(0.2)


def test_a_job_that_kills_its_group_twice_is_failed_and_does_not_take_down_a_third(cluster, serving):
    """Run a fault of a rank from outside, always in the same step of the job."""
    # Steps of a second or more, so that what is seen of one is still so when the blow falls.
    video = serving.create(**{**JOB, "num_inference_steps": 10, "num_frames": 81, "width": 384, "height": 384})
    killed = 0
    while (now := status(serving, video))["status"] != "failed":
        assert now["status"] != "completed"
        if now["stage"] == "denoise" and now["step"] == 1 and now["attempts"] == killed + 1:
            os.kill(find(cluster, "Rank")[0][1], 9)
            killed += 1
        time.sleep(0.01)
    assert killed == 2 and now["error"]["code"] == "poisonous", now
    assert "lost 2 times during step 2" in now["error"]["message"], now
    after = serving.wait(serving.create(prompt="a star", seed=1))
    assert after["status"] == "completed", after


def test_a_group_across_two_hosts_makes_the_same_video(cluster, serve_on, serving):
    """The ranks communicate over the link. Another order of additions changes the last bits, so frames are compared."""
    job = {**JOB, "num_inference_steps": 20}
    expected = frames(content(serving, serving.wait(serving.create(**job))))
    serving.stop()
    across = serve_on(
        cluster,
        denoiser={
            "parallel": {"tensor": 2},
            "threads": 1,
            "rank": {"num_cpus": 5, "labels": {"pool": "gpu"}},
            "placement": "SPREAD",
            "samples_per_step": 1,
        },
    )
    assert sorted(host for host, _ in find(cluster, "Rank")) == [1, 2]
    ours = frames(content(across, across.wait(across.create(**job))))
    difference = np.abs(ours.astype(int) - expected.astype(int))
    assert ours.shape == (9, 64, 64, 3) and difference.mean() < 0.5, difference.mean()
    pids = {pid for _, pid in find(cluster, "Rank")}
    across.stop()
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "ranks outlive their application"
        time.sleep(0.1)
