"""The objects beside the RayService: Service, disruption budgets, network policy, and the volume of the weights."""

from __future__ import annotations

from pathlib import PurePosixPath

from serve_app.manifests.pods import AGENT_PORT, COMPONENT, INSTANCE, METRICS_PORT, Object, claim_name
from serve_app.manifests.pools import Pool
from serve_app.manifests.size import Size
from serve_app.manifests.source import Source

_OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}
_DASHBOARD_PORT = 8265
_REPOSITORY = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
# 126 GB of weights, 57 GB of sharded checkpoint, and room for a second version of the latter.
_WEIGHTS_SIZE = "300Gi"


def service(source: Source, size: Size) -> Object:
    """Return the Service of the HTTP API.

    It selects head Pods whose HTTP proxy answers: the operator sets `ray.io/serve` on a head by that. Its own Service
    also selects workers, which have no proxy. During an upgrade both clusters have such a Pod; either's gateway answers
    for any video, since they share the database and the bucket.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{size.name}-http", "labels": {INSTANCE: size.name}},
        "spec": {
            "selector": {INSTANCE: size.name, COMPONENT: "head", "ray.io/node-type": "head", "ray.io/serve": "true"},
            "ports": [{"name": "http", "port": 80, "targetPort": source.port}],
        },
    }


def disruption_budgets(size: Size, pools: list[Pool]) -> list[Object]:
    """Return a budget for each pool that always has several Pods: one may be evicted at a time.

    Numbers, not shares: of Pods that a RayCluster owns Kubernetes cannot tell how many there should be. A pool of one
    Pod has none, as it would block the drain of its node for ever.
    """
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"{size.name}-{pool.name}"},
            "spec": {
                "minAvailable": pool.least - 1,
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": {"matchLabels": {INSTANCE: size.name, COMPONENT: pool.name}},
            },
        }
        for pool in pools
        if pool.least > 1
    ]


def network_policy(source: Source, size: Size) -> Object:
    """Return a policy of who may connect to the Pods: each other, the operator, Prometheus, and anybody to the gateway.

    What the Pods connect to is left open: database, bucket, broker and the receivers of webhooks are anywhere.
    """

    def ports(*numbers: int) -> list[Object]:
        return [{"protocol": "TCP", "port": number} for number in numbers]

    ours = {"matchLabels": {INSTANCE: size.name}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": size.name},
        "spec": {
            "podSelector": ours,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": ours}]},
                {
                    "from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": _OPERATOR}}],
                    "ports": ports(_DASHBOARD_PORT, AGENT_PORT, source.port),
                },
                {"from": [{"namespaceSelector": {}}], "ports": ports(METRICS_PORT)},
                {"ports": ports(source.port)},
            ],
        },
    }


def weights_claim(size: Size) -> Object:
    """Return the claim of a volume that Pods of all nodes can mount."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": claim_name(size)},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": _WEIGHTS_SIZE}}},
    }


def weights_job(source: Source, size: Size, mount: PurePosixPath) -> Object:
    """Return a Job that downloads the published weights into the volume; it goes on where it was interrupted."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{size.name}-weights"},
        "spec": {
            "backoffLimit": 10,
            "template": {
                "metadata": {"labels": {"app.kubernetes.io/name": "serve-app-weights"}},
                "spec": {
                    "restartPolicy": "OnFailure",
                    "automountServiceAccountToken": False,
                    "securityContext": {
                        "runAsNonRoot": True,
                        "runAsUser": 1000,
                        "fsGroup": 1000,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [
                        {
                            "name": "download",
                            "image": size.image,
                            "command": ["hf", "download", _REPOSITORY, "--local-dir", source.config.model.path],
                            "resources": {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
                            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                            "volumeMounts": [{"name": "weights", "mountPath": str(mount)}],
                        }
                    ],
                    "volumes": [{"name": "weights", "persistentVolumeClaim": {"claimName": claim_name(size)}}],
                },
            },
        },
    }
