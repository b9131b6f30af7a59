"""What the manifests hold, and that Kubernetes, KubeRay and Ray take it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.config import load_file
from serve_app.errors import ConfigError
from serve_app.launch.targets import build
from serve_app.manifests.folder import Files, files, write
from serve_app.manifests.size import Size
from serve_app.manifests.source import read
from tests.manifests.conftest import changed, for_pods
from tests.support import kubernetes as k8s

Write = Callable[..., Path]
Made = Callable[..., Files]
Object = dict[str, Any]
PLACES = ("base", "overlays/production", "overlays/one-host")
SHIPPED = ("a14b-hosts", "a14b-8xh100", "tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a function that returns the manifests of a shipped file. They are made once."""

    @cache
    def make(name: str = "a14b-hosts") -> str:
        return json.dumps(files(read(changed(tmp_path_factory.mktemp("config"), for_pods, name)), Size())[0])

    return lambda *name: json.loads(make(*name))


def service_of(texts: Files, place: str = "base") -> Object:
    (found,) = [one for one in k8s.render(texts, place) if one["kind"] == "RayService"]
    return found


@pytest.mark.parametrize("place", [*PLACES, "weights"])
@pytest.mark.parametrize("name", SHIPPED)
def test_kubernetes_takes_every_object(made: Made, name: str, place: str) -> None:
    texts = made(name)
    if f"{place}/kustomization.yaml" not in texts:
        assert (name, place) == ("tiny", "weights")  # that model is in the package
        return
    for one in k8s.render(texts, place):
        assert one["metadata"]["namespace"] == "wan"
        if one["apiVersion"] in k8s.CORE:
            k8s.check_core(one)
        if one["kind"] == "RayService":
            cluster = one["spec"]["rayClusterConfig"]
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                k8s.check_core(k8s.pod(group["template"]))
            assert k8s.operator_complaints(one) == []


@pytest.mark.skipif(not k8s.CRD, reason="WAN_TEST_RAYSERVICE_CRD names no definition of a RayService")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SHIPPED)
def test_the_definition_takes_the_rayservice(made: Made, name: str, place: str) -> None:
    service = service_of(made(name), place)
    errors = [f"{'/'.join(map(str, one.path))}: {one.message}" for one in k8s.rayservice_schema().iter_errors(service)]
    assert errors == []
    pod = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    pod["containers"][0]["volumeMount"] = []  # a typing error is found
    assert list(k8s.rayservice_schema().iter_errors(service))


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("metadata", "name"), "x" * 48, "name"),
        (("metadata", "annotations"), {"ray.io/initializing-timeout": "soon"}, "initializing-timeout"),
        (("spec", "rayClusterConfig", "rayVersion"), "2.40.0", "token"),
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams"), {"labels": "a=b"}, "labels"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplicas"), 9, "out of order"),
        (
            ("spec", "rayClusterConfig", "workerGroupSpecs", 1, "template", "spec", "restartPolicy"),
            "Always",
            "in place",
        ),
    ],
)
def test_the_operators_rules_refuse(made: Made, where: tuple[Any, ...], value: Any, said: str) -> None:
    service = service_of(made(), "overlays/production")
    place: Any = service
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    (complaint,) = k8s.operator_complaints(service)
    assert said in complaint


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on the PATH")
@pytest.mark.parametrize("place", PLACES)
def test_kubectl_renders_the_same(made: Made, tmp_path: Path, place: str) -> None:
    texts = made()
    write(texts, tmp_path / "out")
    command = ["kubectl", "kustomize", str(tmp_path / "out" / place)]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def by_kind(objects: list[Object]) -> list[tuple[str, str, Object]]:
        return sorted((one["kind"], one["metadata"]["name"], one) for one in objects)

    assert by_kind(list(yaml.safe_load_all(rendered))) == by_kind(k8s.render(texts, place))


@pytest.mark.parametrize("name", SHIPPED)
def test_ray_and_check_take_what_is_inside(
    made: Made, file: Write, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = service_of(made(name))["spec"]["serveConfigV2"]
    monkeypatch.setenv("WAN_SERVE_QUEUE_URL", "amqp://mq.internal/wan")
    content = yaml.safe_load(text)
    assert ServeDeploySchema.model_validate(content).http_options.host == "0.0.0.0"
    path = tmp_path / "inside.yaml"
    if name == "tiny":  # the only model that is here
        path.write_text(text)
        build(path, *load_file(path))
    before = load_file(file(for_pods, name))[1]
    path.write_text(text)
    inside = load_file(path)[1]
    assert inside.model_copy(update={"home": before.home}) == before


def test_head_pools_and_probes(made: Made) -> None:
    cluster = service_of(made())["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    gpu, cpu = cluster["workerGroupSpecs"]
    assert (gpu["labels"], cpu["labels"]) == ({"pool": "gpu"}, {"pool": "cpu"})
    for group in (cluster["headGroupSpec"], gpu, cpu):
        (container,) = group["template"]["spec"]["containers"]
        # The operator's own probe of workers asks for an HTTP proxy, which they do not have.
        assert container["readinessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]
        mounts = {one["name"]: one for one in container["volumeMounts"]}
        assert mounts["shared-mem"]["mountPath"] == "/dev/shm"
        # The autoscaler's container, which the operator adds, mounts the volume of this name at this path.
        assert mounts["ray-logs"]["mountPath"] == "/tmp/ray"
        assert mounts["weights"] == {"name": "weights", "mountPath": "/models", "readOnly": True}
        assert {one["name"] for one in group["template"]["spec"]["volumes"]} == set(mounts)
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "nvidia.com/gpu" not in cpu["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_times_are_those_of_the_configuration(file: Write) -> None:
    service = service_of(
        files(
            read(file(lambda content, args: args["denoiser"].update(start_timeout_s=100, shutdown_timeout_s=7200))),
            Size(),
        )[0]
    )
    assert service["metadata"]["annotations"]["ray.io/initializing-timeout"] == "2100s"
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= 7200


def test_secrets_are_names_only(made: Made) -> None:
    cluster = service_of(made())["spec"]["rayClusterConfig"]
    env = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    secrets = {
        one["name"]: one["valueFrom"]["secretKeyRef"] for one in env if "secretKeyRef" in one.get("valueFrom", {})
    }
    assert set(secrets) == {"PGPASSWORD", "WAN_SERVE_QUEUE_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert secrets["WAN_SERVE_QUEUE_URL"] == {"name": "wan-secrets", "key": "WAN_SERVE_QUEUE_URL"}
    assert secrets["AWS_ACCESS_KEY_ID"]["optional"]  # a Pod may have a role instead


def test_each_cluster_is_a_generation_of_its_own(made: Made) -> None:
    """KubeRay labels Pods with the cluster's name, which is new in every upgrade."""
    cluster = service_of(made())["spec"]["rayClusterConfig"]
    env = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["env"]
    (generation,) = [one for one in env if one["name"] == "WAN_SERVE_GENERATION"]
    assert generation["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.labels['ray.io/cluster']"}}


def test_overlays(made: Made) -> None:
    texts = made()
    base, production, one_host = (service_of(texts, place)["spec"] for place in PLACES)
    groups = [spec["rayClusterConfig"]["workerGroupSpecs"] for spec in (base, production)]
    # Without an autoscaler there are Pods for all replicas; with one, for the fewest.
    assert [(one["minReplicas"], one["replicas"], one["maxReplicas"]) for one in groups[0]] == [(2, 2, 2), (8, 8, 8)]
    assert [(one["minReplicas"], one["replicas"], one["maxReplicas"]) for one in groups[1]] == [(1, 1, 2), (1, 1, 8)]
    assert production["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
    kinds = {one["kind"] for one in k8s.render(texts, "overlays/production")}
    assert {"PodMonitor", "PrometheusRule", "ConfigMap", "NetworkPolicy", "Service"} <= kinds
    assert one_host["upgradeStrategy"] == {"type": "None"}
    volumes = one_host["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"name": "weights", "hostPath": {"path": "/models", "type": "Directory"}} in volumes


def test_the_service_selects_heads_and_the_policy_all(made: Made) -> None:
    objects = {one["kind"]: one for one in k8s.render(made(), "base")}
    cluster = objects["RayService"]["spec"]["rayClusterConfig"]
    set_by_the_operator = {"ray.io/node-type": "head", "ray.io/serve": "true"}
    labels = [
        group["template"]["metadata"]["labels"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    selector = objects["Service"]["spec"]["selector"]
    assert [selector.items() <= {**one, **set_by_the_operator}.items() for one in labels] == [True, False, False]
    everyone = objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    assert all(everyone.items() <= one.items() for one in labels)


def test_several_pods_of_a_pool_have_a_budget(file: Write) -> None:
    def several(content: Object, args: Object) -> None:
        args["denoiser"]["autoscaling"] = {"min_replicas": 3, "max_replicas": 4}

    texts = files(read(file(several)), Size(gpus_per_node=4))[0]
    budgets = [one for one in k8s.render(texts, "base") if one["kind"] == "PodDisruptionBudget"]
    for budget in budgets:
        k8s.check_core(budget)
    assert [(one["metadata"]["name"], one["spec"]["minAvailable"]) for one in budgets] == [("wan-gpu", 2)]


def test_weights_of_two_folders_are_mounted_by_what_they_share(file: Write) -> None:
    def sharded(content: Object, args: Object) -> None:
        args["model"] = {"path": "/data/models/a14b", "sharded": "/data/shards/a14b-2"}

    source = read(file(sharded))
    texts = files(source, Size())[0]
    assert str(source.weights) == "/data"
    (job,) = [one for one in k8s.render(texts, "weights") if one["kind"] == "Job"]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"][-1] == "/data/models/a14b" and container["volumeMounts"][0]["mountPath"] == "/data"


def test_rules_and_dashboards_of_the_project_are_taken(file: Write, tmp_path: Path) -> None:
    extra = tmp_path / "observability"
    extra.mkdir()
    rule = {"alert": "NoData", "expr": "absent(wan_queued_jobs)"}
    (extra / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "wan", "rules": [rule]}]}))
    (extra / "rules.test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": []}))
    (extra / "over_view.json").write_text('{"title": "Overview", "panels": []}')
    (extra / "other.json").write_text("[]")
    objects = k8s.render(files(read(file()), Size(), extra)[0], "overlays/production")
    (rules,) = [one for one in objects if one["kind"] == "PrometheusRule"]
    assert rules["spec"]["groups"] == [{"name": "wan", "rules": [rule]}]
    (dashboard,) = [one for one in objects if one["kind"] == "ConfigMap"]
    k8s.check_core(dashboard)
    assert dashboard["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert dashboard["data"] == {"over_view.json": '{"title": "Overview", "panels": []}'}


def test_files_of_others_stay_and_old_ones_of_ours_go(made: Made, tmp_path: Path) -> None:
    texts, out = made(), tmp_path / "out"
    write({**texts, "base/gone.yaml": texts["base/service.yaml"]}, out)
    (out / "overlays/mine").mkdir()
    (out / "overlays/mine/kustomization.yaml").write_text("resources: [../production]\n")
    write(texts, out)
    assert {str(path.relative_to(out)) for path in out.rglob("*.yaml")} == {*texts, "overlays/mine/kustomization.yaml"}
    (out / "base/service.yaml").write_text("kind: Service\n")
    with pytest.raises(ConfigError, match=r"expected a folder without a base/service\.yaml of your own"):
        write(texts, out)
    assert (out / "base/service.yaml").read_text() == "kind: Service\n"


def test_a_folder_that_cannot_be_written_to(made: Made) -> None:
    with pytest.raises(ConfigError, match="-o has value '/proc/x', expected a folder: No such file"):
        write(made(), Path("/proc/x"))
