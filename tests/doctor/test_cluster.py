"""The doctor on a real Ray: a probe on its host, and Serve's own word on the applications."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from ray import serve

from serve_app.doctor import cluster, judge
from serve_app.doctor.finding import Level
from serve_app.doctor.host import Question
from serve_app.errors import ServeAppError
from tests.support.fakes import until


@serve.deployment
class Well:
    pass


@serve.deployment(health_check_period_s=0.2)
class Sick:
    def check_health(self) -> None:
        raise RuntimeError("it hurts")


def test_a_probe_on_each_host(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x")
    hosts = cluster.Hosts(Question(folders=[str(tmp_path)], disks=[str(tmp_path)]))
    (node,) = [str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    assert hosts.findings == [] and set(hosts.reports) == {node} == set(hosts.offsets)
    report = hosts.reports[node]
    assert report.versions["ray"] == ray.__version__
    assert set(report.disks) == {tempfile.gettempdir(), str(tmp_path)} and set(report.weights.files) == {
        f"{tmp_path}/weights"
    }
    ahead, unsure = hosts.offsets[node]
    assert abs(ahead) <= unsure  # it is this machine's own clock
    assert judge.clocks(hosts.offsets).level == Level.ok


@pytest.mark.slow
async def test_applications(ray_cluster: str) -> None:
    serve.run(cast(Any, Well).bind(), name="well", route_prefix=None)
    serve.run_many(
        [serve.RunTarget(target=cast(Any, Sick).bind(), name="sick", route_prefix=None)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )

    async def judged() -> bool:
        found = {one.said.split()[0].rstrip(":"): one for one in cluster.applications(["well", "sick", "absent"])}
        return set(found) == {"sick", "absent"} and {one.level for one in found.values()} == {Level.error}

    await until(judged, within_s=120)
    assert [one.level for one in cluster.applications(["well"])] == [Level.ok]
    for name in ("well", "sick"):
        serve.delete(name)


def test_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ServeAppError, match=r"nothing answers for the Ray at .*127\.0\.0\.1:1"), cluster.joined(print):
        pass
