"""Pools of equal Pods for a configuration: which deployments share a pool, how large its Pods are, and how many.

Stages with equal node labels share a pool; those with GPUs never share one with those without, unless their labels say
so. Deployments without labels join the first pool of their kind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.capacity import Need, needs
from serve_app.config import Autoscaling, Config
from serve_app.errors import ConfigError
from serve_app.manifests.packing import pack
from serve_app.manifests.size import Size

# CPUs of a Pod that are left to Ray's own processes.
_RAYS_CPUS = 2
_PLENTY = 1e6
_CPUS_PER_GPU = 4
_LEAST_CPUS = 8
_GIB_PER_GPU = 16
# Both experts in bfloat16, pinned in host memory for each GPU (docs/deploy.md).
_GIB_OF_WEIGHTS = 64
_GIB_OF_ENCODER = 32
_GIB_OF_CPU_POD = 16


@dataclass
class Pool:
    """A pool of equal Pods.

    Attributes:
        name: name of KubeRay's worker group.
        gpus: GPUs of a Pod; 0 for a pool without.
        labels: Ray node labels of a Pod.
        cpus: CPUs of a Pod.
        memory: memory of a Pod in GiB.
        least: Pods for the smallest number of replicas of all deployments.
        most: Pods for the largest.
        deployments: names of the deployments that run there.
    """

    name: str
    gpus: int
    labels: dict[str, str]
    cpus: int = 0
    memory: int = 0
    least: int = 1
    most: int = 1
    deployments: list[str] = field(default_factory=list)


def pools(config: Config, size: Size, pipelines: int = 1) -> list[Pool]:
    """Return the pools that a configuration needs, those with GPUs first.

    Args:
        config: all options.
        size: size of the nodes.
        pipelines: number of applications that hold a pipeline.

    Raises:
        ConfigError: a stage does not fit on a node of this size, or its labels or resources cannot be given to Pods.
    """
    smallest, largest = (
        [*needs(one, pipeline=False), *needs(one, gateway=False) * pipelines] for one in (config, _at_most(config))
    )
    _check(smallest)
    found = _grouped(smallest)
    for pool, members in found:
        names = {need.deployment for need in members}
        _fill(pool, members, [need for need in largest if need.deployment in names], config, size)
    return [pool for pool, _ in found]


def _at_most(config: Config) -> Config:
    """Return the configuration with every deployment at its largest number of replicas."""

    def full(scaling: Autoscaling) -> Autoscaling:
        return scaling.model_copy(update={"min_replicas": scaling.max_replicas})

    changed = {}
    for name in type(config).model_fields:
        section = getattr(config, name)
        scalings = {
            option: full(value)
            for option in ("autoscaling", "low_noise_autoscaling")
            if isinstance(value := getattr(section, option, None), Autoscaling)
        }
        if scalings:
            changed[name] = section.model_copy(update=scalings)
    return config.model_copy(update=changed)


def _check(wanted: Sequence[Need]) -> None:
    for need in wanted:
        section = need.option.removesuffix(".resources")
        for name, value in need.labels.items():
            if not re.fullmatch(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", value):
                raise ConfigError(f"{section}.labels has value {{{name}: {value}}}, expected one plain value for Pods")
        if custom := [name for bundle in need.bundles for name in bundle if name not in ("CPU", "GPU")]:
            raise ConfigError(f"{need.option} has the resource {custom[0]!r}, expected labels: Pods have no other")


def _grouped(wanted: Sequence[Need]) -> list[tuple[Pool, list[Need]]]:
    """Return the pools, still without sizes, each with its members."""
    found: list[tuple[Pool, list[Need]]] = []
    # With labels before those without, so that the latter find a pool; with GPUs first.
    for need in sorted(wanted, key=lambda need: (not _has_gpu(need), not need.labels)):
        kind = _has_gpu(need)
        fitting = [
            (pool, members)
            for pool, members in found
            if (pool.labels == need.labels and pool.gpus >= kind if need.labels else (pool.gpus > 0) == kind)
        ]
        if not fitting:
            name = _name(need.labels, "gpu" if kind else "cpu", [pool.name for pool, _ in found])
            fitting = [(Pool(name, int(kind), dict(need.labels)), [])]
            found += fitting
        pool, members = fitting[0]
        members.append(need)
        if need.deployment not in pool.deployments:
            pool.deployments.append(need.deployment)
    return found


def _has_gpu(need: Need) -> bool:
    return any(bundle.get("GPU") for bundle in need.bundles)


def _name(labels: Mapping[str, str], kind: str, taken: Sequence[str]) -> str:
    """Return a name for a pool that no other has: the values of its labels, else its kind."""
    words = re.sub(r"[^a-z0-9]+", "-", "-".join(labels.values()).lower()).strip("-") or kind
    name = words if words[0].isalpha() else f"{kind}-{words}"
    name = name[:20].rstrip("-")
    return next(one for one in (name, *(f"{name}-{number}" for number in range(2, 99))) if one not in taken)


def _fill(pool: Pool, least: list[Need], most: list[Need], config: Config, size: Size) -> None:
    """Set the size and number of a pool's Pods."""
    if pool.gpus:
        pool.gpus = size.gpus_per_node
        wanted = max(_cpus_of_fullest(most, size), _CPUS_PER_GPU * pool.gpus)
        pool.cpus = size.cpus_per_node or wanted
        waiting = config.denoiser.experts == "swap" or config.denoiser.offload == "cpu"
        pool.memory = size.memory_per_node or _GIB_OF_CPU_POD + pool.gpus * (_GIB_PER_GPU + _GIB_OF_WEIGHTS * waiting)
    else:
        largest = max(bundle.get("CPU", 0) for need in most for bundle in need.bundles)
        pool.cpus = max(math.ceil(largest) + _RAYS_CPUS, _LEAST_CPUS)
        pool.memory = _GIB_OF_ENCODER if "Encoder" in pool.deployments else _GIB_OF_CPU_POD
    try:
        pool.least = pack(least, pool.cpus, pool.gpus).nodes
        pool.most = pack(most, pool.cpus, pool.gpus).nodes
    except ValueError as error:
        raise ConfigError(f"--cpus-per-node has value {size.cpus_per_node}: {error}") from None


def _cpus_of_fullest(wanted: list[Need], size: Size) -> int:
    """Return the CPUs of a Pod that its GPUs, not its CPUs, fill.

    Raises:
        ConfigError: a group asks for more GPUs on one node than that has.
    """
    try:
        return math.ceil(pack(wanted, _PLENTY, size.gpus_per_node).cpus) + _RAYS_CPUS
    except ValueError as error:
        raise ConfigError(f"--gpus-per-node has value {size.gpus_per_node}: {error}") from None
