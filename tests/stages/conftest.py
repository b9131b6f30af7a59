"""The `wan` application on a real Ray with the random checkpoint, and how tests look into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import serve

from serve_app.app import wan
from serve_app.config import Config, validate
from serve_app.job_spec import JobSpec
from serve_app.request import Params, VideoRequest, resolve


class Wan:
    """A deployed application."""

    def __init__(self, args: dict[str, Any]) -> None:
        self._args = args
        self.config: Config = validate(args)
        self.pipeline = serve.run(wan(args), name="wan", route_prefix=None).options(stream=True)
        self._jobs = 0

    def redeploy(self, **sections: dict[str, Any]) -> None:
        """Change options while it runs; returns at once."""
        for name, options in sections.items():
            self._args[name] = {**self._args.get(name, {}), **options}
        self.config = validate(self._args)
        target = serve.RunTarget(wan(self._args), name="wan", route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)

    def handle(self, deployment: str) -> Any:
        return serve.get_deployment_handle(deployment, "wan")

    def params(self, prompt: str = "a red circle", **fields: Any) -> Params:
        return resolve(VideoRequest(prompt=prompt, **fields), self.config)

    def job(self, prompt: str = "a red circle", **fields: Any) -> JobSpec:
        self._jobs += 1
        job_id = f"video_{self._jobs}"
        return JobSpec(job_id, self.params(prompt, **fields), f"videos/{job_id}/1")

    def path(self, key: str) -> Path:
        return Path(self.config.storage_url) / key


@pytest.fixture(scope="package")
def deploy(
    ray_cluster: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Wan]]:
    """Deploys the application with options of the test's own, given as a mapping of sections.

    The application that runs is kept if it has these options: deploying takes longer than most tests.
    """
    kept: list[tuple[dict[str, Any], Wan]] = []

    def run(**sections: dict[str, Any]) -> Wan:
        if kept:
            before, app = kept.pop()
            if before == sections:
                kept.append((sections, app))
                return app
            serve.delete("wan")
        kept.append((sections, begin(sections)))
        return kept[-1][1]

    def begin(sections: dict[str, dict[str, Any]]) -> Wan:
        args: dict[str, Any] = {
            "home": str(tmp_path_factory.mktemp("home")),
            "model": {"path": str(checkpoint), "name": "random", "dtype": "float32"},
            "defaults": {
                "width": 64,
                "height": 48,
                "num_frames": 9,
                "num_inference_steps": 6,
                "guidance_scale": 4.0,
                "guidance_scale_2": 3.0,
                "flow_shift": 5.0,
                "negative_prompt": "模糊",
            },
            "encoder": {"resources": {"num_cpus": 0.1}, "threads": 1},
            "denoiser": {
                "rank": {"num_cpus": 0.1},
                "coordinator_cpus": 0.1,
                "threads": 1,
                "samples_per_step": 4,
                "health_check_period_s": 1,
                "health_check_timeout_s": 4,
                "shutdown_timeout_s": 20,
                "start_timeout_s": 600,
            },
            "decoder": {"resources": {"num_cpus": 0.1}, "threads": 1},
            "finisher": {"resources": {"num_cpus": 0.1}, "threads": 1, "health_check_period_s": 1},
        }
        for name, options in sections.items():
            args[name] = {**args.get(name, {}), **options}
        return Wan(args)

    yield run
    serve.delete("wan")


BATCH: dict[str, Any] = {"size": 4, "wait_s": 0.3}


@pytest.fixture
def pair(deploy: Callable[..., Wan]) -> Wan:
    """The application with two ranks that share the weights. It is the same for all tests."""
    return deploy_ranks(deploy, 2)


def deploy_ranks(deploy: Callable[..., Wan], tensor: int) -> Wan:
    """Deploy so many ranks. What arrives together is batched, and a full disk is waited for for four seconds."""
    return deploy(
        denoiser={"parallel": {"tensor": tensor}, "batch": BATCH},
        encoder={"batch": BATCH},
        decoder={"batch": BATCH, "store_wait_s": 4},
        limits={"num_inference_steps": 2000},
    )


def processes(title: str) -> list[psutil.Process]:
    """Processes of this test's Ray whose title begins so, as an operator would find them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, IndexError):
            if process.cmdline()[0].startswith(title):
                found.append(process)
    return found


def until(condition: Callable[[], bool], timeout_s: float = 180) -> None:
    """Wait for something that happens by itself."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout_s} s"
        time.sleep(0.05)
