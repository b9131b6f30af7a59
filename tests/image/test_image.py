"""The image is built without a daemon, and makes a video without a network, weights or root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TAG = "localhost/serve-app-test:latest"
BUILDAH = ["buildah", "--storage-driver", "vfs"]


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def image() -> str:
    for name in ("buildah", "debootstrap"):
        if shutil.which(name) is None or os.geteuid():
            pytest.skip(f"needs root and {name}")
    run("cluster/image/build.sh", TAG, timeout=1800)
    return TAG


@pytest.fixture
def container(image: str) -> Iterator[str]:
    name = run(*BUILDAH, "from", image).strip()
    yield name
    run(*BUILDAH, "rm", name)


def inside(container: str, *command: str, timeout: float = 600) -> str:
    options = ("--isolation", "chroot", "--network", "host")
    return run(*BUILDAH, "run", *options, container, "--", *command, timeout=timeout)


@pytest.mark.slow
def test_the_image_makes_a_video(container: str) -> None:
    assert inside(container, "id", "-u").strip() == "1000"
    said = inside(container, "wan-serve", "demo", "a red circle moves right")
    assert ".mp4" in said
    names = inside(container, "find", "/home/serve", "-name", "*.mp4", "-size", "+1k").split()
    assert names


@pytest.mark.slow
def test_the_image_has_what_ray_and_kubernetes_run(container: str) -> None:
    for command in ("bash -c true", "wget --version", "grep --version", "gcc --version", "ray --version"):
        inside(container, *command.split(maxsplit=1 if command.startswith("bash") else -1))
    inside(container, "python", "-W", "ignore", "-c", "import deepspeed, serve_app.server, asyncpg, aio_pika")
    described = json.loads(run(*BUILDAH, "inspect", "--type", "image", TAG))
    config = described["OCIv1"]["config"]
    assert config["Entrypoint"] == ["wan-serve"] and config["User"] == "1000"
    weights = inside(container, "find", "/", "-xdev", "-name", "*.safetensors", "-size", "+200M")
    assert not weights.strip()
