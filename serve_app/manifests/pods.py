"""Pod templates of the head and of the worker groups."""

from __future__ import annotations

from typing import Any

from serve_app.manifests.pools import Pool
from serve_app.manifests.size import Size
from serve_app.manifests.source import Source

Object = dict[str, Any]
"""A Kubernetes object, or a part of one, as plain values."""

INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"
WEIGHTS = "weights"
"""Name of the volume with the weights."""
METRICS_PORT = 8080
AGENT_PORT = 52365
# Volume of Ray's session folder. The operator gives its autoscaler's container the volume of this name, so it has to be
# the one of the head.
_SESSION = "ray-logs"
_HEAD = {"cpu": "4", "memory": "8Gi"}
# A saved sample is written within seconds; then the ranks end.
_GRACE_S = 120
# Share of a Pod's memory for Ray's objects and for NCCL.
_SHM_SHARE = 0.5


def secret_name(size: Size) -> str:
    """Return the name of the Secret with passwords and access keys, which is not part of the manifests."""
    return f"{size.name}-secrets"


def claim_name(size: Size) -> str:
    """Return the name of the claim of the volume with the weights."""
    return f"{size.name}-weights"


def head(source: Source, size: Size) -> Object:
    """Return the template of the head Pod: Ray's control process, Serve's controller and the HTTP proxy."""
    ports = {"gcs": 6379, "dashboard": 8265, "client": 10001, "serve": source.port, "metrics": METRICS_PORT}
    return _template("head", "ray-head", source, size, ports, _HEAD, memory_gib=8)


def worker(pool: Pool, source: Source, size: Size) -> Object:
    """Return the template of a pool's Pods."""
    amounts = {"cpu": str(pool.cpus), "memory": f"{pool.memory}Gi"}
    if pool.gpus:
        amounts["nvidia.com/gpu"] = str(pool.gpus)
    template = _template(pool.name, "ray-worker", source, size, {"metrics": METRICS_PORT}, amounts, pool.memory)
    if pool.gpus:
        template["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    template["spec"]["automountServiceAccountToken"] = False
    return template


def _template(
    component: str,
    container: str,
    source: Source,
    size: Size,
    ports: dict[str, int],
    amounts: dict[str, str],
    memory_gib: int,
) -> Object:
    mounts: list[Object] = [
        {"name": "shared-mem", "mountPath": "/dev/shm"},
        {"name": _SESSION, "mountPath": "/tmp/ray"},
        {"name": "cache", "mountPath": "/cache"},
    ]
    volumes: list[Object] = [
        {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": f"{int(memory_gib * _SHM_SHARE)}Gi"}},
        {"name": _SESSION, "emptyDir": {}},
        {"name": "cache", "emptyDir": {}},
    ]
    if source.weights is not None:
        mounts.append({"name": WEIGHTS, "mountPath": str(source.weights), "readOnly": True})
        volumes.append(
            {"name": WEIGHTS, "persistentVolumeClaim": {"claimName": claim_name(size), "readOnly": True}},
        )
    return {
        "metadata": {
            "labels": {"app.kubernetes.io/name": "serve-app", INSTANCE: size.name, COMPONENT: component},
            # A node is not emptied to save money while a video of minutes is made on it.
            "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
        },
        "spec": {
            # The operator makes a new Pod for one that has ended; its newer autoscaler allows nothing else.
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": _GRACE_S,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "runAsGroup": 1000,
                "fsGroup": 1000,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": container,
                    "image": size.image,
                    "imagePullPolicy": "IfNotPresent",
                    "env": _environment(source, size),
                    "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
                    "resources": {"requests": amounts, "limits": amounts},
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "livenessProbe": _probe(initialDelaySeconds=30, failureThreshold=120),
                    "readinessProbe": _probe(initialDelaySeconds=10, failureThreshold=10),
                    "volumeMounts": mounts,
                }
            ],
            "volumes": volumes,
        },
    }


def _environment(source: Source, size: Size) -> list[Object]:
    plain = {
        "WAN_SERVE_HOME": "/tmp/wan-serve",
        "TRITON_CACHE_DIR": "/cache/triton",
        "TORCHINDUCTOR_CACHE_DIR": "/cache/inductor",
    }
    secrets: list[Object] = []
    for one in source.secrets:
        reference: Object = {"name": secret_name(size), "key": one.variable}
        if one.optional:
            reference["optional"] = True
        secrets.append({"name": one.variable, "valueFrom": {"secretKeyRef": reference}})
    # Of two clusters on one database, as during an upgrade, the newer one takes the jobs over.
    cluster = {
        "name": "WAN_SERVE_GENERATION",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['ray.io/cluster']"}},
    }
    return [*({"name": name, "value": value} for name, value in plain.items()), cluster, *secrets]


def _probe(**times: int) -> Object:
    """Return a probe of the Ray node alone.

    The operator's own also asks for an HTTP proxy, which only the head has: without this one no worker would ever be
    ready.
    """
    return {"httpGet": {"path": "/api/healthz", "port": AGENT_PORT}, "periodSeconds": 5, "timeoutSeconds": 5, **times}
