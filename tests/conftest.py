"""What all tests share: a random checkpoint of the real layout, a Ray and an S3 server of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.s3 import s3_credentials, s3_options, s3_server, s3_storage

__all__ = ["s3_credentials", "s3_options", "s3_server", "s3_storage"]

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# The controller inherits it: a replica whose rank hangs is replaced at once, as configs/tiny.yaml has it.
os.environ["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow, and jobs on S3")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; `make test-all` runs it"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Wan2.2, both experts."""
    from tests.random_checkpoint import write

    return write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A Ray with one node and more CPUs than the machine has, so that placement is never the obstacle."""
    import ray

    context = ray.init(address="local", num_cpus=16, include_dashboard=True, log_to_driver=False, namespace="serve")
    yield context.address_info["gcs_address"]
    from ray import serve

    serve.shutdown()
    ray.shutdown()
