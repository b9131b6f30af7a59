"""The policy as Serve's controller calls it, on a real store: it never waits or raises, and holds still in doubt."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.serve.config import AutoscalingContext, AutoscalingPolicy
from sqlalchemy import update

from serve_app.app import _by_work
from serve_app.config import Autoscaling, Config
from serve_app.db.tables import Job
from serve_app.events import Done, Progress
from serve_app.jobs.store import JobStore
from serve_app.request import Urgency
from serve_app.scaling import watcher as watching
from serve_app.scaling.policy import WorkPolicy
from tests.support.databases import empty_sqlite, postgres_url, store, store_url
from tests.support.fakes import PARAMS

__all__ = ["empty_sqlite", "postgres_url", "store", "store_url"]

# The policy aims at a tenth of these.
TARGETS = {"interactive": 100.0, "standard": 200.0, "batch": 10_000.0}


def context(target: int, current: int | None = None) -> Any:
    names: dict[str, Any] = dict.fromkeys(
        ("deployment_id", "app_name", "total_queued_requests", "aggregated_metrics", "raw_metrics")
    )
    times: dict[str, Any] = dict.fromkeys(("last_scale_up_time", "last_scale_down_time", "current_time", "config"))
    return AutoscalingContext(
        deployment_name="Denoiser",
        current_num_replicas=target if current is None else current,
        target_num_replicas=target,
        running_replicas=[],
        total_num_requests=0.0,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        **names,
        **times,
    )


def answer(policy: WorkPolicy, target: int, expected: int, current: int | None = None) -> bool:
    """Return whether the policy comes to say `expected`; its thread has its own pace."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if policy(context(target, current)) == (expected, {}):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, float]]]:
    """The free resources of hosts."""
    hosts = [{"CPU": 64.0}]
    monkeypatch.setattr("serve_app.compat.ray.free_resources", lambda: hosts)
    yield hosts


async def ten_seconds_each(store: JobStore) -> None:
    """Have a job complete that its group worked on for ten seconds."""
    job = await store.create(PARAMS, "wan")
    await store.claim("me", 60)
    timings = {"encode": 0.5, "denoise": 10.0, "decode": 15.0, "store": 0.0}
    await store.complete(job.id, 1, Done({}, timings, 1, group_s=10.0, passes=4.0))
    async with store._db.write() as session:
        await session.execute(update(Job).values(started_at=1e9, completed_at=1e9 + 26))


async def test_it_follows_the_queue(store: JobStore, store_url: str, free: list[dict[str, float]]) -> None:
    common: dict[str, Any] = {"target_wait_s": TARGETS, "places": 8, "poll_s": 0.05}
    groups, decoders = (WorkPolicy(store_url, stage, most_groups=2, **common) for stage in ("denoiser", "decoder"))
    assert answer(groups, 3, 0) and answer(decoders, 3, 0)
    await store.create(PARAMS, "wan")
    assert answer(groups, 0, 1) and answer(groups, 4, 4)  # how fast a group is, is not known
    await store.claim("me", 60)
    for job in (await store.list())[0]:
        await store.delete(job.id)
    await ten_seconds_each(store)
    jobs = [await store.create(PARAMS, "wan") for _ in range(7)]
    assert answer(groups, 1, 3) and answer(decoders, 1, 3)  # 70 s in 20 + 10; 1.5 decoders a group, of two at most
    await store.create(PARAMS, "wan", Urgency(priority="interactive"))
    await store.create(PARAMS, "wan", Urgency(start_at=time.time() + 1000))  # not yet
    assert answer(groups, 1, 3)
    claimed = await store.claim("me", 60)
    assert claimed is not None
    await store.progress(claimed.id, 1, Progress("denoise", 4, 4))  # a tenth of it is left
    assert answer(groups, 9, 3)
    for job in jobs:
        await store.delete(job.id)
    assert answer(groups, 4, 1)
    await store.pause()
    assert answer(groups, 4, 1 if claimed.id not in {job.id for job in jobs} else 0)


async def test_no_more_than_fits(store: JobStore, store_url: str, free: list[dict[str, float]]) -> None:
    await ten_seconds_each(store)
    for _ in range(12):
        await store.create(PARAMS, "wan")
    free[:] = [{"CPU": 4.0, "GPU": 3.0}]
    common: dict[str, Any] = {"places": 8, "bundles": [{"CPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}], "poll_s": 0.04}
    bounded = WorkPolicy(store_url, "denoiser", TARGETS, **common)
    assert answer(bounded, 1, 2)
    assert answer(bounded, 3, 3, current=1)  # the third has been asked for, and may hold its GPUs already
    assert answer(WorkPolicy(store_url, "denoiser", TARGETS, bounded=False, **common), 1, 4)


def test_figures_that_are_old_change_nothing(tmp_path: Path, empty_sqlite: Path, free: list[Any]) -> None:
    shutil.copy(empty_sqlite, tmp_path / "jobs.db")
    policy = WorkPolicy(f"sqlite:///{tmp_path / 'jobs.db'}", "denoiser", TARGETS, poll_s=0.03)
    assert answer(policy, 5, 0)
    (tmp_path / "jobs.db").write_bytes(b"no database any more" * 99)
    assert answer(policy, 5, 5)


@pytest.mark.parametrize(
    "url", ["sqlite:////nowhere/jobs.db", "postgresql://nobody@127.0.0.1:1/none", "mysql://x", ":", "", None]
)
def test_a_database_that_is_not_there(url: Any, free: list[Any]) -> None:
    policy = WorkPolicy(url, "denoiser", TARGETS, poll_s=0.02)
    for _ in range(20):
        assert policy(context(3)) == (3, {})
        time.sleep(0.01)
    assert not Path("/nowhere").exists()


def test_arguments_that_are_wrong(tmp_path: Path, empty_sqlite: Path) -> None:
    """A broken policy would stop the deploys of every application."""
    shutil.copy(empty_sqlite, tmp_path / "jobs.db")
    broken: Any = {"target_wait_s": None, "places": 0, "bundles": 7}
    assert WorkPolicy(f"sqlite:///{tmp_path / 'jobs.db'}", "denoiser", **broken)(bare(3)) == (3, {})


def bare(target: int) -> Any:
    """Return a context that has nothing but a target."""
    return type("Context", (), {"target_num_replicas": target})()


def test_threads_end_with_their_policies(tmp_path: Path, empty_sqlite: Path, free: list[Any]) -> None:
    shutil.copy(empty_sqlite, tmp_path / "jobs.db")
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    policies = [WorkPolicy(url, stage, TARGETS, poll_s=0.01) for stage in ("denoiser", "decoder")]
    assert all(answer(policy, 2, 0) for policy in policies)
    (thread,) = (one for one in threading.enumerate() if one.name == "backlog" and one is not None)
    assert len(watching._WATCHERS) == 1
    policies.clear()
    gc.collect()
    thread.join(60)
    assert not thread.is_alive() and not watching._WATCHERS


def test_serve_takes_it(tmp_path: Path) -> None:
    """Pickled by value and made again from JSON, as the controller does."""
    config = Config(home=str(tmp_path))
    assert _by_work(config, "denoiser", Autoscaling()) is None
    policy = _by_work(config, "denoiser", Autoscaling(by="work", min_replicas=0))
    assert isinstance(policy, AutoscalingPolicy)
    made = policy.get_policy()(**json.loads(json.dumps(policy.policy_kwargs)))
    assert made(context(2)) == (2, {})  # the store is not there yet
