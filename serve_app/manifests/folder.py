"""The folder of manifests: a base, components, overlays, and the volume of the weights.

base/                 RayService, Service, disruption budgets, network policy
weights/              the volume and a Job that fills it; applied once, before the base
components/           redis, autoscale, host-weights, one-cluster, monitoring
overlays/production   base with redis, autoscale and monitoring
overlays/one-host     base with host-weights and one-cluster
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve_app.errors import ConfigError
from serve_app.manifests import components, objects, observability
from serve_app.manifests.pods import Object
from serve_app.manifests.pools import Pool, pools
from serve_app.manifests.rayservice import rayservice
from serve_app.manifests.size import Size
from serve_app.manifests.source import Source
from serve_app.manifests.text import dump
from serve_app.whole_file import whole_file

_MARK = "# Written by `wan-serve manifests`, which replaces it. Put changes of your own into an overlay beside these.\n"
Files = dict[str, str]
"""Texts of files by their paths in the folder."""


def files(source: Source, size: Size, extra: Path | None = None) -> tuple[Files, list[Pool]]:
    """Return all files of the manifests, and the pools of Pods.

    Args:
        source: the configuration.
        size: names, image and nodes.
        extra: folder of alert rules and dashboards; None is the one that ships with the project.

    Raises:
        ConfigError: the configuration does not fit on such nodes.
    """
    found = pools(source.config, size, source.pipelines)
    service = rayservice(source, size, found)
    tree: dict[str, dict[str, Any]] = {
        "base": {
            "rayservice": service,
            "service": objects.service(source, size),
            "network-policy": objects.network_policy(source, size),
            **{f"disruption-budget-{one['metadata']['name']}": one for one in objects.disruption_budgets(size, found)},
        }
    }
    if source.weights is not None:
        tree["weights"] = {
            "claim": objects.weights_claim(size),
            "download": objects.weights_job(source, size, source.weights),
        }
    where = extra or observability.folder()
    tree["components/monitoring"] = {
        "pod-monitor": observability.pod_monitor(size),
        **{f"rules-{number}": one for number, one in enumerate(observability.rules(size, where), 1)},
        **{one["metadata"]["name"]: one for one in observability.dashboards(size, where)},
    }
    texts: Files = {}
    for place, members in tree.items():
        texts |= {f"{place}/{name}.yaml": dump(content) for name, content in members.items()}
        kind = "Component" if place.startswith("components/") else "Kustomization"
        texts[f"{place}/kustomization.yaml"] = dump(_kustomization(kind, size, [f"{name}.yaml" for name in members]))
    patches = {
        "redis": components.redis(size),
        "autoscale": components.autoscale(found),
        "one-cluster": components.one_cluster(),
    }
    one_host = ["one-cluster"]
    if source.weights is not None:
        patches["host-weights"] = components.host_weights(service)
        one_host.insert(0, "host-weights")
    for name, operations in patches.items():
        texts[f"components/{name}/kustomization.yaml"] = dump(_patching(operations))
    for name, parts in {"production": ["redis", "autoscale", "monitoring"], "one-host": one_host}.items():
        texts[f"overlays/{name}/kustomization.yaml"] = dump(
            _kustomization("Kustomization", size, ["../../base"], [f"../../components/{one}" for one in parts])
        )
    return {path: _MARK + text for path, text in texts.items()}, found


def write(texts: Files, folder: Path) -> None:
    """Write files into a folder, which may hold other files, but none of these names that somebody else wrote.

    Raises:
        ConfigError: a file was written by somebody else, or the folder cannot be written to.
    """
    for name in texts:
        path = folder / name
        if path.exists() and not path.read_text(errors="replace").startswith(_MARK):
            raise ConfigError(f"-o has value '{folder}', expected a folder without a {name} of your own")
    try:
        for name, text in texts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                file.write(text.encode())
        for path in folder.rglob("*.yaml"):  # of an earlier call, such as the budget of a pool that is no more
            if str(path.relative_to(folder)) not in texts and path.read_text(errors="replace").startswith(_MARK):
                path.unlink()
    except OSError as error:
        raise ConfigError(f"-o has value '{folder}', expected a folder: {error.strerror}") from None


def _kustomization(kind: str, size: Size, resources: list[str], parts: list[str] | None = None) -> Object:
    version = "v1alpha1" if kind == "Component" else "v1beta1"
    found: Object = {"apiVersion": f"kustomize.config.k8s.io/{version}", "kind": kind}
    if kind == "Kustomization":
        found["namespace"] = size.namespace
    return {**found, "resources": resources, **({"components": parts} if parts else {})}


def _patching(operations: list[components.Operation]) -> Object:
    patch = {"target": {"kind": "RayService"}, "patch": dump(operations)}
    return {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component", "patches": [patch]}
