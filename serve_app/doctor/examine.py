"""The whole examination of a deployment: its services, its cluster and each host."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from serve_app.capacity import needs
from serve_app.config import Config, load_file, variables
from serve_app.doctor import cluster, judge
from serve_app.doctor.finding import Finding, error
from serve_app.doctor.host import HostProbe, HostReport, Question
from serve_app.doctor.services import services
from serve_app.errors import ServeAppError
from serve_app.launch.address import base_url

Weights = Literal["sample", "full", "none"]
# A disk of a slow share reads a hundred gigabytes in this time.
_FULL_S = 3600.0


def examine(
    path: Path, say: Callable[[str], None], *, weights: Weights = "sample", offline: bool = False
) -> list[Finding]:
    """Examine the deployment of a configuration file.

    Args:
        path: the file.
        say: called with a line before each part that takes a while.
        weights: how thoroughly weights are compared.
        offline: look at this machine and the services only, and neither at Ray nor at the gateway.

    Raises:
        ConfigError: the file cannot work.
    """
    content, config = load_file(path)
    os.environ.update(variables(content["applications"][0], str(path)))
    question = Question(_folders(config) if weights != "none" else [], weights == "full", _disks(config))
    say("services")
    found = asyncio.run(services(config, "" if offline else _url(content)))
    if offline:
        return [*found, *_hosts_of_this_machine(config, question, weights)]
    try:
        with cluster.joined(say):
            found += cluster.applications([entry["name"] for entry in content["applications"]])
            say("hosts")
            hosts = cluster.Hosts(question, **({"report_s": _FULL_S} if weights == "full" else {}))
    except ServeAppError as problem:
        do = "start a server here, set RAY_ADDRESS, or look at this machine alone with --offline"
        return [*found, error("ray", str(problem), do), *_hosts_of_this_machine(config, question, weights)]
    found += hosts.findings
    if hosts.reports:
        found += [judge.clocks(hosts.offsets), *_judged(config, hosts.reports, hosts.counted, weights)]
    return found


def _hosts_of_this_machine(config: Config, question: Question, weights: Weights) -> list[Finding]:
    return _judged(config, {socket.gethostname(): HostProbe().report(question)}, {}, weights)


def _judged(
    config: Config, reports: dict[str, HostReport], counted: dict[str, float], weights: Weights
) -> list[Finding]:
    parallel = config.denoiser.parallel
    wanted = any(bundle.get("GPU") for need in needs(config) for bundle in need.bundles)
    several = wanted and (parallel.ranks or parallel.tensor * parallel.sequence) > 1
    found = [
        *judge.versions(reports),
        *judge.disks(reports),
        *judge.gpus(reports, counted, wanted, several),
    ]
    return found + (judge.weights(reports, weights == "full") if weights != "none" else [])


def _folders(config: Config) -> list[str]:
    folders = [config.model.folder, config.model.sharded_folder]
    return [str(folder) for folder in folders if folder is not None]


def _disks(config: Config) -> list[str]:
    """Return the folders that hosts write to: a disk that is full there stops jobs."""
    local = [] if config.storage.bucket else [config.storage_url.removeprefix("file://")]
    return [*local, *([str(config.home_path)] if config.store_url.startswith("sqlite") else [])]


def _url(content: dict[str, Any]) -> str:
    gateways = [e for e in content["applications"] if e.get("import_path") == "serve_app.app:gateway"]
    if not gateways or content.get("proxy_location") == "Disabled":
        return ""
    return base_url(content["http_options"], gateways[0].get("route_prefix", "/"))
