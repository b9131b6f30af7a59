"""Markers by path, lanes, and fixtures of all tests: a random checkpoint of the real layout, a Ray and an S3 server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.prometheus import prometheus_bin
from tests.support.s3 import s3_credentials, s3_options, s3_server, s3_storage

__all__ = ["prometheus_bin", "s3_credentials", "s3_options", "s3_server", "s3_storage"]

# Threads of math that have nothing to do would otherwise spin, while others' processes want the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# The controller inherits it: a replica whose rank hangs is replaced at once, as configs/tiny.yaml has it.
os.environ["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow, and jobs on S3")


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    """Turn gradients on again: code that serves turns them off for its thread, and tests of training want them."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_grad_enabled(True)


_KINDS = {
    "accounts": "db",
    "cli/test_canary.py": "db",
    "cli/test_generate.py": "db",
    "cli/test_jobs.py": "db",
    "cluster": "cluster",
    "db": "db",
    "dispatch": "db",
    "dispatch/test_loops.py": "unit",
    "dispatch/test_deployment.py": "unit",
    "dispatch/test_same_pictures.py": "unit",
    "docs/test_examples.py": "db",
    "doctor/test_cluster.py": "ray",
    "doctor/test_services.py": "db",
    "gateway": "db",
    "gateway/test_serve.py": "ray",
    "gateway/test_serve_rabbitmq.py": "ray",
    "gpu": "gpu",
    "image": "cluster",
    "jobs": "db",
    "jobs/test_assignment.py": "unit",
    "jobs/test_verdict.py": "unit",
    "jobs/test_forecast.py": "unit",
    "launch/test_applications.py": "ray",
    "launch/test_preflight.py": "db",
    "launch/test_ray_life.py": "ray",
    "launch/test_startup.py": "ray",
    "metrics/test_restarts.py": "ray",
    "notify": "db",
    "observability": "db",
    "scaling": "db",
    "stages/test_router.py": "unit",
    "scaling/test_desired.py": "unit",
    "scaling/test_live.py": "ray",
    "stages": "ray",
    "stages/test_finishing.py": "unit",
    "stages/test_frame_stream.py": "unit",
    "stages/test_client_liveness.py": "unit",
    "stages/test_decode_again.py": "unit",
    "stages/test_decoder.py": "unit",
    "stages/test_encoder.py": "unit",
    "stages/test_status_board.py": "unit",
    "storage": "db",
    "test_canary_served.py": "ray",
    "test_deployment.py": "ray",
    "test_wheel.py": "ray",
    "wan/parallel/test_collectives.py": "ranks",
    "wan/test_parity.py": "ranks",
    "wan/test_rank_memory.py": "ranks",
    "wan/transformer/test_compile.py": "ranks",
    "wan/vae/test_memory.py": "ranks",
}
"""Markers of folders and files, by their path in tests/. The longest that fits holds; where none does, it is `unit`."""


def _kind(path: Path) -> str:
    """Return the marker of a file, whose path is relative to tests/."""
    ways = [path, *path.parents]  # the longest first
    return next((kind for way in ways if (kind := _KINDS.get(way.as_posix()))), "unit")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no file of another kind for `-m unit`: that alone would take longer than the tests."""
    if config.option.markexpr == "unit" and collection_path.suffix == ".py":
        return _kind(collection_path.relative_to(Path(__file__).parent)) != "unit" or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by their paths, put the longest lane and long files first, and skip what is slow unless asked for."""
    here = Path(__file__).parent
    for item in items:
        item.add_marker(_kind(item.path.relative_to(here)))
    first = ("cluster", "ray", "ranks")
    items.sort(key=lambda item: first.index(kind) if (kind := _kind(item.path.relative_to(here))) in first else 3)
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; `make test-all` runs it"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return a scheduler of lanes beside each other (`make test` has two).

    All files that start a Ray are one lane, since two Rays at a time want more than two processors, and one leaves
    almost half of them idle. Other files go where a lane is free.
    """
    if config.getoption("dist") != "load":  # what -n alone means
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _lane(Path(nodeid.partition("::")[0]).relative_to("tests"))

    config.option.loadscopereorder = False
    return Lanes(config, log)


def _lane(path: Path) -> str:
    return "ray" if _kind(path) in ("ray", "cluster") else path.as_posix()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Wan2.2, both experts."""
    from tests.support.random_checkpoint import write

    return write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A Ray with one node and more CPUs than the machine has, so that placement is never the obstacle."""
    import ray

    # Without the dashboard, whose ten processes want more of the processor than most tests.
    context = ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False, namespace="serve")
    yield context.address_info["gcs_address"]
    from ray import serve

    serve.shutdown()
    ray.shutdown()
