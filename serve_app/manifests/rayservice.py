"""The RayService: Serve's configuration and the cluster that runs it."""

from __future__ import annotations

from importlib.metadata import version

import yaml

from serve_app.manifests.pods import Object, head, worker
from serve_app.manifests.pools import Pool
from serve_app.manifests.size import Size
from serve_app.manifests.source import Source
from serve_app.manifests.text import dump


def rayservice(source: Source, size: Size, pools: list[Pool]) -> Object:
    """Return the RayService with as many Pods as the largest number of replicas needs; nothing scales them."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {
            "name": size.name,
            "annotations": {"ray.io/initializing-timeout": f"{source.loading_s}s"},
        },
        "spec": {
            "serveConfigV2": dump(source.serve),
            "rayClusterDeletionDelaySeconds": source.draining_s,
            "upgradeStrategy": {"type": "NewCluster"},
            "excludeHeadPodFromServeSvc": False,
            "rayClusterConfig": {
                "rayVersion": version("ray"),
                "enableInTreeAutoscaling": False,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    # No work for the head: what it runs must not be killed for a video's memory.
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": head(source, size),
                },
                "workerGroupSpecs": [_group(pool, source, size) for pool in pools],
            },
        },
    }


def served(text: str) -> Object:
    """Return the Serve configuration that a RayService holds as text."""
    content: Object = yaml.safe_load(text)
    return content


def _group(pool: Pool, source: Source, size: Size) -> Object:
    group: Object = {
        "groupName": pool.name,
        "replicas": pool.most,
        "minReplicas": pool.most,
        "maxReplicas": pool.most,
        "rayStartParams": {},
        "template": worker(pool, source, size),
    }
    return {**group, "labels": pool.labels} if pool.labels else group
