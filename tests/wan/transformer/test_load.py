from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import WanTransformer3DModel

from benchmarks.model.parity import CASES, relative_error, run_ranks
from serve_app.wan.generate import Generator
from serve_app.wan.parallel.mesh import Mesh
from serve_app.wan.parallel.process_groups import ProcessGroups, _interface_towards, init_process_groups
from serve_app.wan.transformer.load import load_expert
from serve_app.wan.weights.checkpoint import Checkpoint
from tests.support import ranks
from tests.support.ranks import CASE

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
_CLONE_NEWNET = 0x40000000


@dataclass
class Ended:
    """The results that a group of two processes left behind."""

    results: dict[str, list[dict[str, Any]]]
    stdout: str
    stderr: str


def run_two(folder: Path, output: Path, dtypes: list[str], env: dict[str, str]) -> Ended:
    """Two ranks as processes that begin anew, in an environment of the test's."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        arguments = {
            "rank": rank,
            "size": 2,
            "address": "127.0.0.1",
            "port": port,
            "folder": str(folder),
            "output": str(output),
            "dtypes": dtypes,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.support.ranks", json.dumps(arguments)],
                cwd=ROOT,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        texts = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    stdout, stderr = ("\n".join(part).strip() for part in zip(*texts, strict=True))
    assert [process.returncode for process in processes] == [0, 0], stderr
    results = {dtype: [torch.load(output / f"{dtype}-{rank}.pt") for rank in range(2)] for dtype in dtypes}
    return Ended(results, stdout, stderr)


@pytest.fixture(scope="module")
def bare(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Two ranks on a machine without any program: no C++ compiler, no ninja, nothing compiled earlier."""
    empty, output = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("output")
    env = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "GLOO_SOCKET_IFNAME")}
    env |= {"PATH": str(empty), "TORCH_EXTENSIONS_DIR": str(empty)}
    assert not any(shutil.which(name, path=env["PATH"]) for name in ("c++", "g++", "gcc", "cc", "clang++", "ninja"))
    ended = run_two(checkpoint, output, ["float32", "bfloat16"], env)
    assert list(empty.iterdir()) == []
    return ended


def test_no_compiler_and_no_ninja(bare: Ended, reference: dict[str, torch.Tensor]) -> None:
    for rank in bare.results["float32"]:
        assert relative_error(rank["latents"], reference[CASE]) <= 1e-4


def test_stdout_stays_quiet(bare: Ended) -> None:
    assert bare.stdout == ""


def test_ranks_in_step_have_exchanged_as_much(bare: Ended) -> None:
    counts = [[rank["exchanged"] for rank in bare.results[dtype]] for dtype in ("float32", "bfloat16")]
    assert [first == second for first, second in counts] == [True, True]
    assert 0 < counts[0][0] < counts[1][0], "they go on counting"


def test_each_rank_holds_about_half(bare: Ended, generator: Generator) -> None:
    whole = sum(p.numel() for p in generator.experts["transformer"].parameters())
    for rank in bare.results["float32"]:
        assert whole / 2 < rank["parameters"] < 0.75 * whole


def test_modules_kept_in_float32(checkpoint: Path, bare: Ended, alone: ProcessGroups) -> None:
    theirs = WanTransformer3DModel.from_pretrained(checkpoint / "transformer", dtype=torch.bfloat16)
    expected = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert set(expected.values()) == {torch.float32, torch.bfloat16}
    ours = load_expert(Checkpoint(checkpoint), "transformer", alone, torch.bfloat16, CPU)
    assert {name: parameter.dtype for name, parameter in ours.named_parameters()} == expected
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name
    for rank in bare.results["bfloat16"]:
        assert rank["dtypes"] == expected


def test_bfloat16_on_two_ranks(checkpoint: Path, bare: Ended, reference: dict[str, torch.Tensor]) -> None:
    """Two ranks round differently from one, but not more: both are equally far from float32."""
    single = relative_error(Generator(checkpoint, dtype=torch.bfloat16).latents(CASES[CASE]), reference[CASE])
    for rank in bare.results["bfloat16"]:
        assert 0 < relative_error(rank["latents"], reference[CASE]) < 2 * single < 0.1


def test_a_group_of_one_does_without_deepspeed(checkpoint: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from serve_app.wan.parallel.mesh import Mesh\n"
        "from serve_app.wan.parallel.process_groups import init_process_groups\n"
        "from serve_app.wan.generate import Generator\n"
        "world = init_process_groups(0, Mesh(), '', 0, torch.device('cpu'), 1)\n"
        f"Generator(Path({str(checkpoint)!r}), groups=world)\n"
        "assert 'deepspeed' not in sys.modules and not torch.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def _waiting(rank: int, mesh: Mesh, port: int, raised: Path) -> None:
    """Wait as the first of two ranks, of which the second ends at once."""
    if rank == 0:
        with pytest.raises(torch.distributed.DistError):
            init_process_groups(0, mesh, "127.0.0.1", port, CPU, 2)
        raised.touch()


def test_ranks_that_never_come(tmp_path: Path) -> None:
    run_ranks(_waiting, Mesh(tensor=2), tmp_path / "raised")
    assert (tmp_path / "raised").exists()


def test_the_interface_is_that_of_the_route() -> None:
    addresses = psutil.net_if_addrs()
    loopback = _interface_towards("127.0.0.1", 29500)
    assert "127.0.0.1" in {entry.address for entry in addresses[loopback]}
    assert _interface_towards("127.0.0.2", 29500) == loopback
    for name, entries in addresses.items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                assert _interface_towards(entry.address, 29500) == name


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Names of two hosts: network namespaces joined by a cable, as good as apart for gloo."""
    names = [f"wan-{os.getpid()}-{host}" for host in range(2)]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add w0 netns {names[0]} type veth peer name w1 netns {names[1]}",
        *(f"ip -n {name} addr add 10.213.0.{host + 1}/24 dev w{host}" for host, name in enumerate(names)),
        *(f"ip -n {name} link set {link} up" for host, name in enumerate(names) for link in ("lo", f"w{host}")),
    ]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, timeout=10)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"network namespaces are not allowed here: `{command}`: {error}")
        time.sleep(0.2)  # the link comes up
        yield names
    finally:
        for name in names:
            with_ip = shutil.which("ip")
            if with_ip:
                subprocess.run([with_ip, "netns", "del", name], capture_output=True, timeout=10, check=False)


def _on_host(rank: int, mesh: Mesh, port: int, hosts: list[str], folder: Path, output: Path) -> None:
    """Be a rank on a host."""
    with Path("/run/netns", hosts[rank]).open() as host:
        assert ctypes.CDLL(None).setns(host.fileno(), _CLONE_NEWNET) == 0
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    ranks.main(rank, mesh.ranks, "10.213.0.1", port, str(folder), str(output), ["float32"])


def test_ranks_on_two_hosts(
    checkpoint: Path, reference: dict[str, torch.Tensor], two_hosts: list[str], tmp_path: Path
) -> None:
    run_ranks(_on_host, Mesh(tensor=2), two_hosts, checkpoint, tmp_path)
    for rank in range(2):
        latents = torch.load(tmp_path / f"float32-{rank}.pt")["latents"]
        assert relative_error(latents, reference[CASE]) <= 1e-4
