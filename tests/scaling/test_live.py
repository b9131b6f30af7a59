"""A live server that is scaled by the work in its queue: from nothing to several groups, to nothing, and up again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve

from serve_app.server import Server
from tests.support.serving import REPOSITORY
from tests.test_deployment import free_port

WITHIN_S = 240


def write_config(folder: Path, checkpoint: Path) -> Path:
    """Write configs/tiny.yaml for the random checkpoint, scaled by work, with short delays."""
    content = yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text())
    args = content["applications"][0]["args"]
    args["home"] = str(folder / "home")
    args["model"].update(path=str(checkpoint), name="random")
    args["defaults"].update(width=64, height=64, num_frames=9, num_inference_steps=6)
    args["limits"]["num_inference_steps"] = 2000
    quick = {"by": "work", "min_replicas": 0, "poll_s": 0.5, "upscale_delay_s": 1, "downscale_delay_s": 3}
    wait = {"interactive": 1, "standard": 2, "batch": 4}
    args["denoiser"]["autoscaling"] = {**quick, "max_replicas": 3, "target_wait_s": wait}
    for stage in ("encoder", "decoder"):
        args[stage]["autoscaling"] = {**quick, "max_replicas": 2}
    for application in content["applications"]:
        application["args"] = args
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def groups() -> int:
    """Return the number of running groups."""
    denoiser = serve.status().applications["wan"].deployments["Denoiser"]
    return int(denoiser.replica_states.get("RUNNING", 0))


def seen(condition: Callable[[int], bool]) -> bool:
    """Return whether the number of groups comes to fulfil a condition."""
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        if condition(groups()):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_from_nothing_to_several_groups_and_back(tmp_path: Path, checkpoint: Path) -> None:
    path = write_config(tmp_path, checkpoint)
    with Server(path, port=free_port(), own_ray=True) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        server.wait_ready()

        def create(**fields: Any) -> str:
            return str(http.post("/v1/videos", json={"prompt": "a star", **fields}).raise_for_status().json()["id"])

        def completed(video_id: str) -> bool:
            deadline = time.monotonic() + WITHIN_S
            while time.monotonic() < deadline:
                video = http.get(f"/v1/videos/{video_id}").raise_for_status().json()
                if video["status"] in ("completed", "failed"):
                    assert video["status"] == "completed", video
                    return True
                time.sleep(0.1)
            return False

        assert groups() == 0
        assert completed(create(num_inference_steps=200)) and groups() >= 1
        classes = ("interactive", "standard", "batch")
        ids = [create(num_inference_steps=50 * (1 + nth % 6), priority=classes[nth % 3]) for nth in range(18)]
        assert seen(lambda count: count >= 2)
        assert all(completed(video_id) for video_id in ids)
        assert seen(lambda count: count == 0)
        assert completed(create())
        assert groups() >= 1
