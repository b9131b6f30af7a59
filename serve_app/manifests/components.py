"""Components of kustomize: changes of the base that overlays put together.

The patches are lists of operations (RFC 6902), since kustomize does not know how to merge the lists of a RayService.
"""

from __future__ import annotations

from typing import Any

from serve_app.manifests.pods import WEIGHTS, Object, secret_name
from serve_app.manifests.pools import Pool
from serve_app.manifests.size import Size

Operation = dict[str, Any]
_CLUSTER = "/spec/rayClusterConfig"
# Seconds without work after which a Pod is given back: loading the weights again costs minutes.
_IDLE_S = 900


def redis(size: Size) -> list[Operation]:
    """Return the change by which Ray's control process keeps its state in Redis, so that workers outlive the head."""
    password = {"name": secret_name(size), "key": "REDIS_PASSWORD", "optional": True}
    options = {"redisAddress": size.redis, "redisPassword": {"valueFrom": {"secretKeyRef": password}}}
    return [_add(f"{_CLUSTER}/gcsFaultToleranceOptions", options)]


def autoscale(pools: list[Pool]) -> list[Operation]:
    """Return the change by which Ray asks for Pods when replicas need them, and gives idle ones back."""
    amounts = {"cpu": "500m", "memory": "1Gi"}
    options = {
        "version": "v2",
        "idleTimeoutSeconds": _IDLE_S,
        "resources": {"requests": amounts, "limits": amounts},
    }
    operations = [_add(f"{_CLUSTER}/enableInTreeAutoscaling", True), _add(f"{_CLUSTER}/autoscalerOptions", options)]
    for number, pool in enumerate(pools):
        group = f"{_CLUSTER}/workerGroupSpecs/{number}"
        operations += [_add(f"{group}/replicas", pool.least), _add(f"{group}/minReplicas", pool.least)]
    return operations


def host_weights(rayservice: Object) -> list[Operation]:
    """Return the change by which Pods read the weights from the disk of their node, at the same path."""
    cluster = rayservice["spec"]["rayClusterConfig"]
    groups = {f"{_CLUSTER}/headGroupSpec": cluster["headGroupSpec"]}
    groups |= {f"{_CLUSTER}/workerGroupSpecs/{n}": group for n, group in enumerate(cluster["workerGroupSpecs"])}
    operations = []
    for place, group in groups.items():
        pod = group["template"]["spec"]
        path = _named(pod["containers"][0]["volumeMounts"], WEIGHTS)[1]["mountPath"]
        number, _ = _named(pod["volumes"], WEIGHTS)
        volume = {"name": WEIGHTS, "hostPath": {"path": path, "type": "Directory"}}
        operations.append({"op": "replace", "path": f"{place}/template/spec/volumes/{number}", "value": volume})
    return operations


def one_cluster() -> list[Operation]:
    """Return the change by which an upgrade starts no second cluster, for which there may be no GPUs."""
    return [_add("/spec/upgradeStrategy/type", "None")]


def _add(path: str, value: Any) -> Operation:
    """Return the operation that sets a field, whether or not it is there."""
    return {"op": "add", "path": path, "value": value}


def _named(items: list[Object], name: str) -> tuple[int, Object]:
    return next((number, item) for number, item in enumerate(items) if item["name"] == name)
