from __future__ import annotations

from dataclasses import replace

from serve_app.doctor import judge
from serve_app.doctor.finding import Finding, Level
from serve_app.doctor.gpus import Gpu
from serve_app.doctor.host import HostReport
from serve_app.doctor.weights import Fingerprints

H200 = Gpu(0, "H200", "570", 40, 0, lanes=(16, 16), links=(18, 18))
WELL = HostReport(
    host="x",
    versions={"serve_app": "0.2.0", "ray": "2.60.0", "torch": "2.13.0"},
    disks={"/tmp": (60, 100)},
    gpus=[H200],
    sick="",
    weights=Fingerprints({"/m/a": "1", "/m/b": "2"}),
)
HOSTS = {"a": WELL, "b": WELL, "c": WELL}


def lines(found: list[Finding]) -> list[str]:
    return [f"{one.level} {one.said}" for one in found]


def with_gpu(**changes: object) -> dict[str, HostReport]:
    return {"a": WELL, "b": replace(WELL, gpus=[replace(H200, **changes)])}  # type: ignore[arg-type]


def test_all_well() -> None:
    found = [
        judge.clocks({"a": (0.0, 0.01), "b": (0.3, 0.01)}),
        *judge.versions(HOSTS),
        *judge.disks(HOSTS),
        *judge.gpus(HOSTS, {"a": 1, "b": 1, "c": 1}, True, True),
        *judge.weights(HOSTS, False),
    ]
    assert [one.level for one in found] == [Level.ok] * 5
    assert "healthy: 3 x H200" in found[3].said and "2 files, the same on 3 hosts" in found[4].said


def test_clocks_count_only_what_is_certain() -> None:
    assert judge.clocks({"a": (0.0, 0.0), "b": (1.5, 0.9)}).level == Level.ok
    behind = judge.clocks({"a": (0.0, 0.01), "b": (-3.0, 0.5), "c": (0.1, 0.01)})
    assert (behind.level, behind.said) == (Level.warning, "c is at least 2.6 s ahead of b")
    assert judge.clocks({"a": (0.0, 0.01), "b": (90.0, 0.5)}).level == Level.error
    assert judge.clocks({}).level == Level.ok


def test_a_version_that_differs() -> None:
    other = replace(WELL, versions={**WELL.versions, "torch": "2.12.0"}, gpus=[replace(H200, driver="565")])
    assert lines(judge.versions({**HOSTS, "d": other})) == [
        "error torch is 2.13.0 on most hosts, 2.12.0 on d",
        "warning NVIDIA driver is 570 on most hosts, 565 on d",
    ]


def test_disks_that_fill_up() -> None:
    found = judge.disks({"a": replace(WELL, disks={"/tmp": (10, 100), "/data": (4, 100)})})
    assert [one.level for one in found] == [Level.warning, Level.error]
    assert "0.0 GB of 0.0 GB free at /data" in found[1].said


def test_gpus_that_are_sick() -> None:
    for changes, said in (
        ({"memory_errors": 3}, "error b, GPU 0: 3 uncorrectable memory errors"),
        ({"remapping": True}, "error b, GPU 0: a row of its memory waits to be replaced, or could not be"),
        ({"slowed": True}, "warning b, GPU 0: slowed down at 40 °C"),
        ({"celsius": 95}, "warning b, GPU 0: slowed down at 95 °C"),
        ({"lanes": (8, 16)}, "warning b, GPU 0: 8 of 16 lanes of PCIe"),
        ({"links": (17, 18)}, "warning b, GPU 0: 17 of 18 NVLinks work"),
    ):
        assert lines(judge.gpus(with_gpu(**changes), {}, True, True)) == [said]
    # Links matter only to ranks that share weights or tokens.
    assert [one.level for one in judge.gpus(with_gpu(links=(17, 18)), {}, True, False)] == [Level.ok]


def test_gpus_that_are_gone() -> None:
    assert lines(judge.gpus(HOSTS, {"b": 8}, True, False)) == ["error b shows 1 GPUs, and Ray counts 8"]
    silent = {"a": WELL, "b": replace(WELL, gpus=[], sick="nvidia-smi does not answer within 30 s")}
    assert lines(judge.gpus(silent, {"b": 8}, True, False)) == ["error b: nvidia-smi does not answer within 30 s"]
    none = {"a": replace(WELL, gpus=[])}
    assert lines(judge.gpus(none, {}, True, False)) == ["error the configuration asks for GPUs, and no host has one"]
    assert lines(judge.gpus(none, {}, False, False)) == ["ok none, and none is asked for"]


def test_weights_that_differ() -> None:
    damaged = replace(WELL, weights=Fingerprints({"/m/a": "1", "/m/b": "9"}))
    short = replace(WELL, weights=Fingerprints({"/m/a": "1"}))
    absent = replace(WELL, weights=Fingerprints(missing=["/m"]))
    wrong = replace(WELL, weights=Fingerprints(WELL.weights.files, wrong=["/m/a"]))
    assert lines(judge.weights({**HOSTS, "d": damaged, "e": short, "f": absent, "g": wrong}, True)) == [
        "error f has no /m",
        "error g: /m/a is not what was published under its name",
        "error /m/b differs on d, e from that of the other hosts",
    ]


def test_every_finding_that_is_not_well_says_what_to_do() -> None:
    found = [
        *judge.gpus(
            with_gpu(memory_errors=1, remapping=True, slowed=True, lanes=(1, 2), links=(1, 2)), {"a": 9}, True, True
        ),
        *judge.weights({"a": WELL, "b": replace(WELL, weights=Fingerprints())}, True),
        judge.clocks({"a": (0, 0), "b": (9, 0)}),
    ]
    assert len(found) == 9 and all(one.do and "\n" not in str(one) for one in found)
