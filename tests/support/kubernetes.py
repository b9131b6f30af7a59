"""Kubernetes' rules without a cluster: rendering as kustomize does, schemas, and KubeRay's own rules."""

from __future__ import annotations

import gzip
import os
import re
import warnings
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import PurePosixPath
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft4Validator

Object = dict[str, Any]
CRD = os.environ.get("WAN_TEST_RAYSERVICE_CRD", "")
"""File of KubeRay's definition of a RayService; tests that need it are skipped without it."""
CORE = ("v1", "policy/v1", "networking.k8s.io/v1", "batch/v1")
VERSION = "1.36"
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_DURATION = re.compile(r"([0-9.]+(h|m|s|ms))+|[0-9]+")


def render(texts: dict[str, str], place: str) -> list[Object]:
    """Return the objects of a kustomization: its resources, changed by its components.

    Only what the manifests use: resources, components, patches by operations, and a namespace.
    """
    own = yaml.safe_load(texts[f"{place}/kustomization.yaml"])
    found: list[Object] = []
    for name in own.get("resources", []):
        path = _joined(place, name)
        found += [yaml.safe_load(texts[path])] if path in texts else render(texts, path)
    for name in own.get("components", []):
        component = _joined(place, name)
        found += render(texts, component)
        for patch in yaml.safe_load(texts[f"{component}/kustomization.yaml"]).get("patches", []):
            for one in found:
                if one["kind"] == patch["target"]["kind"]:
                    _apply(one, yaml.safe_load(patch["patch"]))
    if "namespace" in own:
        for one in found:
            one["metadata"]["namespace"] = own["namespace"]
    return found


def _joined(place: str, name: str) -> str:
    parts: list[str] = []
    for part in (*PurePosixPath(place).parts, *PurePosixPath(name).parts):
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def _apply(content: Any, operations: list[Object]) -> None:
    for operation in operations:
        *way, last = operation["path"].strip("/").split("/")
        parent = content
        for step in way:
            parent = parent[int(step) if isinstance(parent, list) else step]
        key = int(last) if isinstance(parent, list) else last
        if operation["op"] == "replace":
            assert parent[key] is not None
        else:
            assert operation["op"] == "add" and isinstance(parent, dict)
        parent[key] = operation["value"]


def check_core(content: Object) -> None:
    """Check an object of Kubernetes itself by its published schema, unknown fields included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kubernetes_validate.validate(content, VERSION, strict=True)


def pod(template: Object) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x", **template["metadata"]},
        "spec": template["spec"],
    }


@cache
def rayservice_schema() -> Draft4Validator:
    """Return the schema of a RayService in the file that `CRD` names, made to refuse unknown fields."""
    with gzip.open(CRD) if CRD.endswith(".gz") else open(CRD, "rb") as file:  # noqa: PTH123
        definition = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    return Draft4Validator(_strict(deepcopy(version["schema"]["openAPIV3Schema"])))


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: _strict(value) for name, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        return {"type": ["integer", "string"]}
    inner = schema.get("properties")
    strict = schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields")
    if strict and isinstance(inner, dict) and inner:
        schema.setdefault("additionalProperties", False)
    return schema


def operator_complaints(service: Object) -> list[str]:
    """Return what KubeRay 1.7 itself refuses in a RayService, beyond its schema."""
    return list(_complaints(service))


def _complaints(service: Object) -> Iterator[str]:
    name, notes = service["metadata"]["name"], service["metadata"].get("annotations", {})
    if len(name) > 47 or not _DNS_LABEL.fullmatch(name):
        yield f"name {name}"
    timeout = notes.get("ray.io/initializing-timeout", "1s")
    if not _DURATION.fullmatch(timeout) or float(re.findall(r"[0-9.]+", timeout)[0]) <= 0:
        yield f"initializing-timeout {timeout}"
    spec, cluster = service["spec"], service["spec"]["rayClusterConfig"]
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "deletion delay"
    strategy = spec.get("upgradeStrategy", {}).get("type", "NewCluster")
    if strategy not in ("NewCluster", "None", "NewClusterWithIncrementalUpgrade"):
        yield f"upgradeStrategy {strategy}"
    if strategy == "NewClusterWithIncrementalUpgrade" and not cluster.get("enableInTreeAutoscaling"):
        yield "incremental upgrade without autoscaler"
    if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headService has a name"
    yield from _of_groups(cluster)
    yield from _of_head(cluster, notes)
    token = cluster.get("authOptions", {}).get("mode") == "token"
    if token and tuple(map(int, cluster.get("rayVersion", "0").split(".")[:2])) < (2, 52):
        yield "token without a Ray of 2.52 or later"


def _of_groups(cluster: Object) -> Iterator[str]:
    groups = {"head": cluster["headGroupSpec"], **{one["groupName"]: one for one in cluster["workerGroupSpecs"]}}
    if len(groups) != 1 + len(cluster["workerGroupSpecs"]):
        yield "two groups with one name"
    v2 = cluster.get("enableInTreeAutoscaling") and cluster.get("autoscalerOptions", {}).get("version") != "v1"
    for name, group in groups.items():
        start = group.get("rayStartParams", {})
        if not group["template"]["spec"].get("containers"):
            yield f"{name} has no container"
        if "labels" in start:
            yield f"{name} has labels in rayStartParams"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
            yield f"{name} has resources twice"
        for key, value in group.get("labels", {}).items():
            if not _LABEL_VALUE.fullmatch(value) or not _LABEL_VALUE.fullmatch(key.rpartition("/")[2]):
                yield f"{name} has the label {key}: {value}"
        if v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name} restarts in place with the second autoscaler"
        if name != "head" and not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"{name} has replicas out of order"
        if any(not isinstance(value, str) for value in start.values()):
            yield f"{name} has a start parameter that is no text"


def _of_head(cluster: Object, notes: dict[str, str]) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    set_here = {one["name"] for one in head["template"]["spec"]["containers"][0].get("env", [])}
    start = head.get("rayStartParams", {})
    if "gcsFaultToleranceOptions" in cluster:
        if {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & set_here or "redis-password" in start:
            yield "Redis in two places"
        if {"ray.io/ft-enabled", "ray.io/external-storage-namespace"} & set(notes):
            yield "fault tolerance in two places"
    elif "RAY_REDIS_ADDRESS" in set_here:
        yield "Redis without gcsFaultToleranceOptions"
    if "REDIS_USERNAME" in set_here or "redis-username" in start:
        yield "the user of Redis outside of gcsFaultToleranceOptions"
    off = not cluster.get("enableInTreeAutoscaling")
    if "RAY_enable_autoscaler_v2" in set_here and (off or "version" in cluster.get("autoscalerOptions", {})):
        yield "the second autoscaler by an environment variable"
