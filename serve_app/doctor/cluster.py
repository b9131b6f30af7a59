"""The Ray cluster as the doctor sees it: what Serve says of the applications, and a probe on each host."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.compat.ray import serve_client
from serve_app.doctor.finding import Finding, error, ok, warning
from serve_app.doctor.host import HostProbe, HostReport, Question
from serve_app.errors import ServeAppError, one_line
from serve_app.launch import guard, ray_probe

_JOIN_S = 60
# A host starts a process for its probe, and imports this package there.
_START_S = 180
_REPORT_S = 120
_PINGS = 10
_WELL = ("HEALTHY", "UPSCALING", "DOWNSCALING", "UPDATING")


@contextmanager
def joined(say: Callable[[str], None]) -> Iterator[None]:
    """Join the Ray that runs here for as long as the block runs.

    Args:
        say: called with a line on addresses that are passed over.

    Raises:
        ServeAppError: none runs here, or it does not let this process in.
    """
    address = ray_probe.find(say)
    if address is None:
        raise ServeAppError("no Ray runs here")
    try:
        with guard.deadline(_JOIN_S, f"{address} did not let us in within {_JOIN_S} s"):
            ray.init(address=address.host_port, namespace="serve", log_to_driver=False, logging_level=logging.WARNING)
    except Exception as problem:
        raise ServeAppError(f"cannot join {address}: {one_line(problem)}") from problem
    try:
        yield
    finally:
        ray.shutdown()


def applications(names: Sequence[str]) -> list[Finding]:
    """Check that Serve runs these applications, and that each of their deployments is healthy."""
    check = "applications"
    if serve_client(needed=False) is None:
        return [error(check, "Serve does not run on this Ray", "start a server (`wan-serve up`, or the RayService)")]
    status = serve.status().applications
    found = []
    for name in names:
        if name not in status:
            found.append(error(check, f"{name} is not deployed", "deploy the configuration again"))
            continue
        one = status[name]
        sick = {label: each for label, each in one.deployments.items() if each.status.value not in _WELL}
        for label, each in sick.items():
            said = f"{name}: {label} is {each.status.value}. {each.message}"
            found.append(error(check, _short(said), f"look at the log of {label}"))
        if one.status.value == "DEPLOYING":
            found.append(warning(check, f"{name} is still being deployed", "wait until it has loaded"))
        elif one.status.value != "RUNNING" and not sick:
            found.append(error(check, _short(f"{name} is {one.status.value}. {one.message}"), "see its logs"))
    return found or [ok(check, f"running: {', '.join(names)}")]


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


class Hosts:
    """A probe on each host that is alive.

    Attributes:
        findings: hosts that did not answer.
        offsets: by host, seconds that its clock is ahead of this machine's, and how far off that may be.
        reports: by host, what it says of itself.
        counted: by host, the GPUs that Ray counts there.
    """

    def __init__(self, question: Question, *, report_s: float = _REPORT_S) -> None:
        self.findings: list[Finding] = []
        self.offsets: dict[str, tuple[float, float]] = {}
        self.reports: dict[str, HostReport] = {}
        self.counted: dict[str, float] = {}
        self._report_s = report_s
        nodes = {str(node["NodeManagerAddress"]): node for node in ray.nodes() if node["Alive"]}
        self.counted = {host: float(node["Resources"].get("GPU", 0)) for host, node in nodes.items()}
        remote = ray.remote(num_cpus=0, max_restarts=0)(HostProbe)
        probes = {
            host: remote.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote()
            for host, node in nodes.items()
        }
        probes = self._answering(probes)
        for host, probe in probes.items():
            self.offsets[host] = _offset(probe)
        reports = {host: probe.report.remote(question) for host, probe in probes.items()}
        for host, reference in reports.items():
            try:
                self.reports[host] = ray.get(reference, timeout=self._report_s)
            except (RayError, TimeoutError) as problem:
                self._silent(host, problem)
        for probe in probes.values():
            ray.kill(probe)

    def _answering(self, probes: dict[str, Any]) -> dict[str, Any]:
        """Return the probes that answer, and note the others."""
        first = {host: probe.clock.remote() for host, probe in probes.items()}
        found = {}
        for host, reference in first.items():
            try:
                ray.get(reference, timeout=_START_S)
                found[host] = probes[host]
            except (RayError, TimeoutError) as problem:
                self._silent(host, problem)
        return found

    def _silent(self, host: str, problem: Exception) -> None:
        do = f"look at Ray's log of {host}; `ray stop --force` there gives its work to other hosts"
        self.findings.append(error("hosts", f"{host} does not answer: {one_line(problem)}", do))


def _offset(probe: Any) -> tuple[float, float]:
    """Return the seconds that a host's clock is ahead, by the fastest of some questions, and half of what that took."""
    best = (0.0, float("inf"))
    for _ in range(_PINGS):
        began = time.time()
        theirs = ray.get(probe.clock.remote(), timeout=_START_S)
        took = time.time() - began
        if took / 2 < best[1]:
            best = (theirs - began - took / 2, took / 2)
    return best
