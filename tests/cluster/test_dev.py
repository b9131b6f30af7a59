"""Several hosts on one machine: each host, a fault that reaches only one, and an end that leaves nothing."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.dev import Cluster, ClusterError
from cluster.dev.commands import main
from cluster.dev.loopback import MARK
from cluster.dev.processes import control
from cluster.dev.teardown import leftovers, take_down
from tests.stages.conftest import until
from tests.support.serving import QUICK

REPOSITORY = Path(__file__).parent.parent.parent

ACTOR = """
import ray
ray.init(logging_level="ERROR", log_to_driver=False, namespace="test")

@ray.remote(num_cpus=1, name="counter", lifetime="detached", get_if_exists=True, resources={"denoise": 1})
class Counter:
    def __init__(self):
        self.count = 0
    def increment(self):
        self.count += 1
        return self.count

print("count", ray.get(Counter.remote().increment.remote(), timeout=60))
"""


def traces(name: str) -> list[str]:
    """Return all that this machine has of a cluster: namespaces, links, files, processes."""
    found = [str(path) for path in [*Path("/tmp").glob(f"rc-{name}*"), *Path("/etc/netns").glob(f"rc-{name}*")]]
    for kind in (["netns", "list"], ["-br", "link"]) if shutil.which("ip") else ():
        lines = subprocess.run(["ip", *kind], capture_output=True, text=True, check=True).stdout.splitlines()
        found += [line for line in lines if line.startswith(f"rc-{name}")]
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = " ".join(process.info["cmdline"] or [])
        if f"/rc-{name}/" in line or (process.info["environ"] or {}).get(MARK, "").startswith(f"{name}/"):
            found.append(f"{process.pid} {line}")
    return found


@pytest.fixture
def name() -> Iterator[str]:
    name = f"y{secrets.token_hex(3)}"
    yield name
    take_down(name)


def tool(*arguments: str) -> subprocess.Popen[str]:
    """Start `python -m cluster.dev`, as in a terminal of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.dev", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(process: subprocess.Popen[str], pattern: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return
    raise AssertionError("".join(seen))


def run_on(cluster: Cluster, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**cluster.env, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_hosts_are_seen_with_what_they_declare(three_hosts):
    nodes = {node.host: node for node in three_hosts.view() if node.alive}
    assert sorted(nodes) == [0, 1, 2]
    assert [nodes[i].ip for i in range(3)] == [host.ip for host in three_hosts.nodes]
    assert len({host.ip for host in three_hosts.nodes}) == 3
    assert [nodes[i].resources.get("GPU", 0) for i in range(3)] == [0, 1, 2]
    assert [nodes[i].resources["CPU"] for i in range(3)] == [8, 8, 8]
    assert nodes[1].resources["denoise"] == 8 and nodes[2].labels["pool"] == "codec"


def test_a_host_has_its_own_address_and_reaches_the_others(three_hosts):
    script = f"""
import socket
server = socket.create_server(("", 0))
assert socket.gethostbyname(socket.gethostname()) == {three_hosts.nodes[1].ip!r}
socket.create_connection(({three_hosts.nodes[0].ip!r}, 6379), timeout=5)
print("fine")
"""
    done = three_hosts.run(1, [sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "fine\n", done.stderr


def test_kill_ends_one_host_and_join_brings_it_back(three_hosts):
    others = [three_hosts.nodes[0].pids(), three_hosts.nodes[1].pids()]
    bystander = three_hosts.popen(2, ["sleep", "600"])
    three_hosts.kill(2)
    assert bystander.wait(10) == -signal.SIGKILL and three_hosts.nodes[2].pids() == []
    three_hosts.wait_alive({0, 1}, timeout_s=30)
    for host, pids in enumerate(others):
        assert set(pids) <= set(three_hosts.nodes[host].pids())
    ip = three_hosts.nodes[2].ip
    three_hosts.join(2)
    assert {node.ip for node in three_hosts.view() if node.alive and node.host == 2} == {ip}


def test_a_host_that_is_cut_off_for_a_moment_stays(three_hosts):
    before = {node.node_id for node in three_hosts.view() if node.alive}
    started = time.monotonic()
    three_hosts.cut(1, seconds=1)
    assert time.monotonic() - started >= 1 and not three_hosts.nodes[1].is_cut
    three_hosts.wait_alive({0, 1, 2}, timeout_s=30)
    assert {node.node_id for node in three_hosts.view() if node.alive} == before


def test_a_decoder_with_shares_of_several_gpus_sees_all_of_its_host(three_hosts):
    share = {"num_cpus": 0.1, "num_gpus": 0.2, "resources": {"codec": 1}}
    stage = {"memory_fraction": 0.1, "resources": share}
    script = f"""
import os
import ray
from serve_app.app import decoder_actor
from serve_app.config import validate

@ray.remote
def look():
    return os.environ.get("CUDA_VISIBLE_DEVICES"), ray.get_runtime_context().get_accelerator_ids()["GPU"]

ray.init(logging_level="ERROR", log_to_driver=False)
for devices in (2, 1):
    options = decoder_actor(validate({{"decoder": {{"devices": devices, **{stage}}}}}))
    visible, own = ray.get(look.options(**options).remote(), timeout=60)
    assert len(own) == 1, own
    print("all" if visible is None else "one" if visible == own[0] else visible)
"""
    done = run_on(three_hosts, script)
    assert done.stdout.split() == ["all", "one"], done.stderr


def test_ranks_that_share_weights_see_all_gpus_of_their_host_and_their_own_first(three_hosts):
    need = {"num_cpus": 0.1, "num_gpus": 0.8, "resources": {"codec": 1}}
    script = f"""
import os
import sys
import ray
from serve_app.config import validate
from serve_app.engine.group import rank_actor
from serve_app.engine.rank import Rank

class Looking(Rank):
    def __init__(self, config, rank):
        assert "torch" not in sys.modules, "it may have asked for devices"
        super().__init__(config, rank)

    def look(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]

ray.init(logging_level="ERROR", log_to_driver=False)
looking = ray.remote(concurrency_groups={{"health": 1}})(Looking)
for axis, peers in (("tensor", True), ("tensor", False), ("guidance", True)):
    config = validate({{"denoiser": {{"parallel": {{axis: 2}}, "rank": {need}, "symmetric_memory": peers}}}})
    ranks = [looking.options(**rank_actor(config)).remote(config, rank) for rank in range(2)]
    print(*sorted(ray.get([rank.look.remote() for rank in ranks], timeout=60)))
    for rank in ranks:
        ray.kill(rank)
"""
    done = run_on(three_hosts, script)
    assert done.stdout.splitlines() == ["0,1 1,0", "0 1", "0 1"], done.stderr


@pytest.mark.slow
def test_a_host_that_is_cut_off_for_long_is_dead_and_comes_back_anew(three_hosts):
    before = {node.node_id for node in three_hosts.view() if node.alive and node.host == 1}
    processes = three_hosts.nodes[1].pids()
    three_hosts.cut(1)
    try:
        assert three_hosts.nodes[1].is_cut
        three_hosts.wait_alive({0, 2}, timeout_s=60)
        assert set(processes) & set(three_hosts.nodes[1].pids()), "a cut must not end processes"
    finally:
        three_hosts.join(1)
    after = {node.node_id for node in three_hosts.view() if node.alive and node.host == 1}
    assert len(after) == 1 and after != before


def test_actors_outlive_the_control_process(three_hosts):
    def count() -> str:
        return subprocess.run(
            [sys.executable, "-c", ACTOR], env=three_hosts.env, capture_output=True, text=True, timeout=120
        ).stdout

    assert "count 1" in count()
    hosts = [set(host.pids()) for host in three_hosts.nodes]
    killed = control(three_hosts.nodes[0].pids())
    three_hosts.kill_control()
    assert killed is not None and killed.pid not in three_hosts.nodes[0].pids()
    with pytest.raises(ClusterError, match="does not answer"):
        three_hosts.view(timeout_s=0.5)
    three_hosts.join(0)
    three_hosts.wait_alive({0, 1, 2}, timeout_s=30)
    assert "count 2" in count()
    for host, pids in enumerate(hosts):  # drivers and idle workers come and go
        lost = pids - set(three_hosts.nodes[host].pids()) - {killed.pid}
        assert not lost, f"host {host} lost {lost}"


@pytest.mark.parametrize("when", ["making", "Ctrl-C takes it down"])
def test_ctrl_c_leaves_nothing(namespaces, name, when):
    process = tool("up", "--nodes", "1", "--name", name)
    read_until(process, when)
    assert traces(name)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert traces(name) == []


def test_down_cleans_what_a_tool_left_that_was_killed_half_way(namespaces, name):
    process = tool("up", "--nodes", "2", "--name", name)
    read_until(process, "making")
    until(lambda: bool(traces(name)))
    process.kill()
    process.wait()
    assert traces(name) and name in leftovers()
    assert tool("down", "--name", name).wait(60) == 0
    assert traces(name) == []


@pytest.mark.slow
def test_up_replaces_what_a_killed_tool_left_and_down_in_another_shell_ends_it(namespaces, name):
    first = tool("up", "--nodes", "1", "--name", name)
    read_until(first, "Ctrl-C takes it down")
    refused = tool("up", "--nodes", "1", "--name", name)
    assert refused.wait(30) == 2 and "not in use" in refused.stdout.read()
    first.kill()
    first.wait()
    second = tool("up", "--nodes", "1", "--name", name)
    read_until(second, "Ctrl-C takes it down")
    assert tool("down", "--name", name).wait(60) == 0
    assert second.wait(60) == 0 and "somebody took it down" in second.stdout.read()
    assert traces(name) == []


@pytest.mark.slow
def test_on_loopback_hosts_can_be_killed_but_not_cut(name):
    said: list[str] = []
    with Cluster(2, name=name, loopback=True, config=QUICK, say=said.append) as cluster:
        assert "`cut` does nothing" in said[0]
        assert len([node for node in cluster.view() if node.alive]) == 2
        head = cluster.nodes[0].pids()
        cluster.kill(1)
        cluster.wait_alive({0}, timeout_s=60)
        assert set(head) <= set(cluster.nodes[0].pids())
        cluster.join(1)
        cluster.wait_alive({0, 1})
        with pytest.raises(ClusterError, match="cannot be cut"):
            cluster.cut(1)
        with pytest.raises(ClusterError, match="--redis"):
            cluster.kill_control()
            cluster.join(0)
    assert traces(name) == []


def test_without_root_it_says_what_cannot_be_tested(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    said: list[str] = []
    cluster = Cluster(2, say=said.append)
    assert cluster.state.loopback and len(said) == 1
    assert "not root" in said[0] and "`kill` spares" in said[0] and "addresses" in said[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("up --nodes 0", "nodes has value 0, expected 1 to 32"),
        ("up --name Big", "name has value 'Big', expected 1 to 8 small letters"),
        ("up --cpus many", "--cpus has value 'many', expected a whole number"),
        ("up --gpus 3:1", "--gpus has value '3:1', expected a host from 0 to 2"),
        ("up --labels 2:pool", "--labels has value 'pool', expected KEY=VALUE"),
        ("up --resources spot=yes", "--resources has value 'spot=yes', expected KEY=AMOUNT"),
        ("up --redis nowhere", "redis has value 'nowhere', expected HOST:PORT or auto"),
        ("up --redis 127.0.0.1:1", "redis has value '127.0.0.1:1', expected the address of a running Redis"),
        ("up --loopback --redis auto", "redis has value 'auto', expected HOST:PORT"),
        ("up --object-store-mb 1", "object_store_mb has value 1, expected at least 80"),
        ("kill 1 --name nobody", "--name has value 'nobody', expected a cluster that is up"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cluster.dev", *arguments.split()])
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1, error
