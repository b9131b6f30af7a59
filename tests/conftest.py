"""What all tests share: a random checkpoint of the real layout, a Ray and an S3 server of their own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.s3 import s3_credentials, s3_options, s3_server, s3_storage

__all__ = ["s3_credentials", "s3_options", "s3_server", "s3_storage"]

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
    """What serves turns them off for its thread; the tests of training, in the same one, want them."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_grad_enabled(True)


_WITH_RAY = {
    "stages",
    "cluster",
    "test_applications.py",
    "test_startup.py",
    "test_deployment.py",
    "test_ray_life.py",
    "test_serve.py",
    "test_serve_rabbitmq.py",
    "test_wheel.py",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    lanes = {item: _lane(item.path.relative_to(here)) for item in items}
    items.sort(key=lambda item: lanes[item] != "ray")  # the longest lane first
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; `make test-all` runs it"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Lanes beside each other (`make test` has two). Whatever starts a Ray is one of them, since two Rays at a time
    want more than two processors, and one leaves almost half of them idle. Other files go where a lane is free."""
    if config.getoption("dist") != "load":  # what -n alone means
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _lane(Path(nodeid.partition("::")[0]).relative_to("tests"))

    config.option.loadscopereorder = False
    return Lanes(config, log)


def _lane(path: Path) -> str:
    return "ray" if {path.parts[0], path.name} & _WITH_RAY else path.as_posix()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random Wan2.2, both experts."""
    from tests.support.random_checkpoint import write

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
