"""Judgements over the reports of all hosts. Knows no Ray and no network: reports go in, findings come out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from serve_app.doctor.finding import Finding, error, ok, warning
from serve_app.doctor.gpus import Gpu
from serve_app.doctor.host import HostReport

# Seconds between clocks. Leases and deadlines go by the database's clock; signatures of S3 allow 15 minutes, those of
# webhooks and tokens 5 minutes; logs of several hosts are read side by side.
_SKEW_WARNS_S, _SKEW_FAILS_S = 1.0, 60.0
# Shares of a disk. Ray makes no more objects beyond 95 %.
_DISK_WARNS, _DISK_FAILS = 0.85, 0.95
_HOT = 90
_SHOWN = 4

Reports = Mapping[str, HostReport]
"""Reports by the names of hosts."""


def clocks(offsets: Mapping[str, tuple[float, float]]) -> Finding:
    """Judge the clocks.

    Args:
        offsets: by host, seconds that its clock is ahead of this machine's, and how far off the measurement may be.
    """
    if not offsets:
        return ok("clocks", "one host, nothing to compare")
    # Only what is certain counts: each end of the measured intervals that is nearer to the others.
    ahead = max(offsets, key=lambda host: offsets[host][0] - offsets[host][1])
    behind = min(offsets, key=lambda host: offsets[host][0] + offsets[host][1])
    certain = offsets[ahead][0] - offsets[ahead][1] - offsets[behind][0] - offsets[behind][1]
    if certain > _SKEW_WARNS_S:
        say = error if certain > _SKEW_FAILS_S else warning
        return say("clocks", f"{ahead} is at least {certain:.1f} s ahead of {behind}", "set both by NTP (chronyd)")
    unsure = max(measured[1] for measured in offsets.values())
    return ok("clocks", f"{_hosts(len(offsets))} within {_SKEW_WARNS_S:g} s, measured to {unsure * 1000:.0f} ms")


def versions(reports: Reports) -> list[Finding]:
    """Judge whether all hosts have the same versions, the driver's included."""
    by_package: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for host, report in reports.items():
        for package, version in report.versions.items():
            by_package[package][version].append(host)
        for driver in {gpu.driver for gpu in report.gpus}:
            by_package["NVIDIA driver"][driver].append(host)
    found = []
    for package, hosts in by_package.items():
        if len(hosts) > 1:
            usual = max(hosts, key=lambda version: len(hosts[version]))
            others = "; ".join(f"{version} on {_named(where)}" for version, where in hosts.items() if version != usual)
            do = "install the same image or packages everywhere"
            say = warning if package == "NVIDIA driver" else error
            found.append(say("versions", f"{package} is {usual} on most hosts, {others}", do))
    some = next(iter(reports.values())).versions
    return found or [
        ok("versions", f"the same on {_hosts(len(reports))}: serve_app {some['serve_app']}, ray {some['ray']}")
    ]


def disks(reports: Reports) -> list[Finding]:
    """Judge the free space of each host's disks."""
    found = []
    least: tuple[float, str] = (1.0, "")
    for host, report in reports.items():
        for folder, (free, total) in report.disks.items():
            share = free / total if total else 0
            least = min(least, (share, f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB at {folder} on {host}"))
            if share < 1 - _DISK_WARNS:
                say = error if share < 1 - _DISK_FAILS else warning
                said = f"{host} has {free / 1e9:.1f} GB of {total / 1e9:.1f} GB free at {folder}"
                found.append(say("disk", said, "remove old files there, Ray's old sessions in /tmp/ray for example"))
    return found or [ok("disk", f"least free: {least[1]}")]


def gpus(reports: Reports, counted: Mapping[str, float], wanted: bool, joined: bool) -> list[Finding]:
    """Judge GPUs and their links.

    Args:
        reports: by host.
        counted: by host, the GPUs that Ray counts; empty without Ray.
        wanted: whether the configuration asks for GPUs.
        joined: whether its groups share weights or tokens, which takes fast links.
    """
    found: list[Finding] = []
    number = 0
    for host, report in reports.items():
        number += len(report.gpus)
        if report.sick:
            found.append(error("gpus", f"{host}: {report.sick}", f"drain {host} and restart it, or its driver"))
            continue
        if counted.get(host, 0) > len(report.gpus):
            said = f"{host} shows {len(report.gpus)} GPUs, and Ray counts {counted[host]:g}"
            found.append(error("gpus", said, f"drain {host}; `dmesg` tells of a GPU that has fallen off the bus"))
        for gpu in report.gpus:
            found += _gpu(host, gpu)
        if joined:
            found += _links(host, report.gpus)
    if wanted and not number and not found:
        found.append(error("gpus", "the configuration asks for GPUs, and no host has one", "add GPU hosts"))
    kinds = Counter(gpu.name for report in reports.values() for gpu in report.gpus)
    shown = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    return found or [ok("gpus", f"healthy: {shown}" if kinds else "none, and none is asked for")]


def _gpu(host: str, gpu: Gpu) -> list[Finding]:
    where = f"{host}, GPU {gpu.index}"
    found = []
    if gpu.memory_errors:
        said = f"{where}: {gpu.memory_errors} uncorrectable memory errors"
        found.append(error("gpus", said, f"drain {host} and reset the GPU; if it happens again, have it replaced"))
    if gpu.remapping:
        said = f"{where}: a row of its memory waits to be replaced, or could not be"
        found.append(error("gpus", said, f"drain {host} and reset the GPU; if it stays, have it replaced"))
    if gpu.slowed or (gpu.celsius or 0) >= _HOT:
        heat = "" if gpu.celsius is None else f" at {gpu.celsius} °C"
        found.append(warning("gpus", f"{where}: slowed down{heat}", "look at fans, air and power supply"))
    if gpu.lanes and gpu.lanes[0] < gpu.lanes[1]:
        said = f"{where}: {gpu.lanes[0]} of {gpu.lanes[1]} lanes of PCIe"
        found.append(warning("links", said, "seat the card anew; offloaded blocks and host copies are slow"))
    return found


def _links(host: str, several: list[Gpu]) -> list[Finding]:
    return [
        warning(
            "links",
            f"{host}, GPU {gpu.index}: {gpu.links[0]} of {gpu.links[1]} NVLinks work",
            f"drain {host} and reset the GPU; ranks that share weights are slow until then",
        )
        for gpu in several
        if gpu.links[0] < gpu.links[1]
    ]


def weights(reports: Reports, whole: bool) -> list[Finding]:
    """Judge whether all hosts have the same weights.

    Args:
        reports: by host.
        whole: whether all bytes were read.
    """
    found = []
    by_file: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    names = {name for report in reports.values() for name in report.weights.files}
    for host, report in reports.items():
        for folder in report.weights.missing:
            found.append(error("weights", f"{host} has no {folder}", "mount it there, or download the model there"))
        for path in report.weights.wrong:
            said = f"{host}: {path} is not what was published under its name"
            found.append(error("weights", said, "remove it and download again (`hf download`)"))
        if not report.weights.missing:
            for name in names:
                by_file[name][report.weights.files.get(name, "missing")].append(host)
    for name, digests in sorted(by_file.items()):
        if len(digests) > 1:
            usual = max(digests, key=lambda digest: len(digests[digest]))
            others = [host for digest, hosts in digests.items() if digest != usual for host in hosts]
            said = f"{name} differs on {_named(others)} from that of the other hosts"
            found.append(error("weights", said, "copy the model again, and restart the replicas there"))
    how = "all bytes" if whole else "sizes and samples; `--weights full` reads all bytes"
    return found or [ok("weights", f"{len(names)} files, the same on {_hosts(len(reports))} ({how})")]


def _hosts(number: int) -> str:
    return "1 host" if number == 1 else f"{number} hosts"


def _named(hosts: list[str]) -> str:
    more = f" and {len(hosts) - _SHOWN} more" if len(hosts) > _SHOWN else ""
    return ", ".join(hosts[:_SHOWN]) + more
