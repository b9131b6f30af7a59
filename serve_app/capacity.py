"""Resources that a configuration needs, and a check whether the hosts of a cluster could ever provide them.

Knows nothing of Ray: hosts are numbers and labels. Only certain shortages count, so a cluster that passes may still be
too small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.config import Autoscaling, Config, Resources

_ROUNDING = 1e-6
Amounts = Mapping[str, float]
"""Resources by Ray's names: CPU, GPU and custom ones."""


@dataclass(frozen=True)
class Host:
    """A host of the cluster, with all its resources, used or not."""

    resources: Amounts
    labels: Mapping[str, str] = field(default_factory=dict)

    def has(self, amounts: Amounts, labels: Mapping[str, str]) -> bool:
        """Return whether the host, if nobody else used it, has these amounts and labels."""
        enough = all(self.resources.get(name, 0) + _ROUNDING >= amount for name, amount in amounts.items())
        return enough and all(_meets(self.labels.get(name), wanted) for name, wanted in labels.items())


@dataclass(frozen=True)
class Need:
    """The resources that one replica of a deployment needs.

    Attributes:
        deployment: name in Serve.
        option: option of the configuration that sets the amounts.
        bundles: amounts; each bundle has to fit on one host.
        strategy: Ray's placement strategy of the bundles.
        labels: node labels that a host must have.
        replicas: smallest number of replicas.
    """

    deployment: str
    option: str
    bundles: tuple[Amounts, ...]
    strategy: str = "PACK"
    labels: Mapping[str, str] = field(default_factory=dict)
    replicas: int = 1

    @property
    def total(self) -> Amounts:
        """The amounts of all bundles together."""
        return _sum(self.bundles)

    def __str__(self) -> str:
        several = len(self.bundles) > 1 and self.strategy == "STRICT_PACK"
        return f"{_text(self.total)}{' on one host' if several else ''}{_labelled(self.labels)}"


def needs(config: Config, *, pipeline: bool = True, gateway: bool = True) -> list[Need]:
    """Return the resources that the deployments of a configuration need.

    Args:
        config: all options.
        pipeline: whether the pipeline's application counts.
        gateway: whether the gateway's application counts.
    """
    found = []
    if pipeline:
        found += [
            _of_stage("Encoder", "encoder", config.encoder.resources, config.encoder.autoscaling),
            *_of_groups(config),
            _of_stage("Decoder", "decoder", config.decoder.resources, config.decoder.autoscaling),
            *_of_finishers(config),
            Need(
                "Pipeline",
                "pipeline",
                ({"CPU": config.pipeline.num_cpus},),
                replicas=config.pipeline.autoscaling.min_replicas,
            ),
        ]
    if gateway:
        found += [
            Need("gateway", "gateway", ({"CPU": config.gateway.num_cpus},), replicas=config.gateway.num_replicas),
            Need("dispatcher", "dispatcher", ({"CPU": config.dispatcher.num_cpus},)),
        ]
    return found


def impossible(wanted: Sequence[Need], hosts: Sequence[Host]) -> list[str]:
    """Return a line for each need that these hosts could never meet, even if nothing else ran on them."""
    lines = [line for need in wanted if (line := _impossible(need, hosts))]
    if lines:
        return lines
    has = _sum(host.resources for host in hosts)
    asked = _sum(need.total for need in wanted for _ in range(need.replicas))
    for name, amount in asked.items():
        if amount > has.get(name, 0) + _ROUNDING:
            users = ", ".join(
                f"{need.replicas} x {need.deployment} ({need.total[name]:g})"
                for need in wanted
                if need.replicas and need.total.get(name)
            )
            lines.append(
                f"all deployments together ask for {_text({name: amount})}, and the cluster has "
                f"{_text({name: has.get(name, 0)})}: {users}"
            )
    return lines


def described(hosts: Iterable[Host]) -> str:
    """Return a description of hosts for people, with equal ones counted."""
    kinds = Counter(_text(host.resources) for host in hosts)
    return "; ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.most_common(4)) or "no host"


def _of_stage(deployment: str, section: str, resources: Resources, scaling: Autoscaling) -> Need:
    return Need(
        deployment,
        f"{section}.resources",
        (_amounts(resources),),
        labels=resources.labels,
        replicas=scaling.min_replicas,
    )


def _of_finishers(config: Config) -> list[Need]:
    """Return the need of the finishers, if requests may ask for them."""
    stage = config.finisher
    return [_of_stage("Finisher", "finisher", stage.resources, stage.autoscaling)] if stage.enabled else []


def _of_groups(config: Config) -> list[Need]:
    """Return the needs of the groups of ranks: one kind of group, or one for each expert."""
    stage = config.denoiser
    bundles = ({"CPU": stage.coordinator_cpus}, *[_amounts(stage.rank)] * stage.parallel.size)
    low = stage.low_noise_autoscaling or stage.autoscaling
    groups = {"Denoiser": stage.autoscaling}
    if stage.experts == "split":
        groups = {"HighNoiseDenoiser": stage.autoscaling, "LowNoiseDenoiser": low}
    return [
        Need(name, "denoiser.rank", bundles, stage.placement, stage.rank.labels, scaling.min_replicas)
        for name, scaling in groups.items()
    ]


def _impossible(need: Need, hosts: Sequence[Host]) -> str | None:
    """Return why no replica could ever run; None if that is not certain."""
    for bundle in need.bundles:
        if not any(host.has(bundle, need.labels) for host in hosts):
            one = f" for each of {len(need.bundles) - 1} ranks" if len(need.bundles) > 2 else ""
            what = f"{_text(bundle)} on one host{_labelled(need.labels)}{one}"
            return f"{need.option} asks for {what}, and no host has that ({described(hosts)})"
    if need.strategy == "STRICT_PACK" and not any(host.has(need.total, need.labels) for host in hosts):
        return (
            f"{need.option} and denoiser.parallel ask for {need}, as denoiser.placement STRICT_PACK has it, and no "
            f"host has that ({described(hosts)})"
        )
    able = sum(any(host.has(bundle, need.labels) for bundle in need.bundles) for host in hosts)
    if need.strategy == "STRICT_SPREAD" and able < len(need.bundles):
        return (
            f"denoiser.placement STRICT_SPREAD asks for {len(need.bundles)} hosts{_labelled(need.labels)}, one for "
            f"each rank and one for the coordinator, and there are {able}"
        )
    return None


def _amounts(resources: Resources) -> Amounts:
    found = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.resources}
    return {name: amount for name, amount in found.items() if amount}


def _sum(several: Iterable[Amounts]) -> dict[str, float]:
    total: dict[str, float] = {}
    for amounts in several:
        for name, amount in amounts.items():
            total[name] = total.get(name, 0) + amount
    return total


def _text(amounts: Amounts) -> str:
    """Return amounts for people, without the resources that Ray adds to every node."""
    shown = {name: amount for name, amount in amounts.items() if not name.startswith(_NOT_SHOWN)}
    return ", ".join(f"{round(amount, 4):g} {name}" for name, amount in shown.items()) or "nothing"


_NOT_SHOWN = ("node:", "memory", "object_store_memory", "bundle_group_")


def _labelled(labels: Mapping[str, str]) -> str:
    named = ", ".join(f"{name}: {value}" for name, value in labels.items())
    return f" with the labels {{{named}}}" if labels else ""


def _meets(has: str | None, wanted: str) -> bool:
    """Return whether a label has a value that a selector of Ray wants: `a`, `!a`, `in(a, b)` or `!in(a, b)`."""
    excluded = wanted.startswith("!")
    plain = wanted.removeprefix("!")
    values = plain[3:-1].split(",") if plain.startswith("in(") and plain.endswith(")") else [plain]
    return (has in [value.strip() for value in values]) != excluded
