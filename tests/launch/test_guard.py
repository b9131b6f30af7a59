"""The guard around small programs that behave like a server with a Ray, or worse."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

# A server: its processes include an orphan in a session of its own, which ignores SIGTERM.
SERVER = """
import os, subprocess, sys, time
from serve_app.launch import guard
guard.LIMIT_S = 2
guard.fork()
subprocess.run(["sh", "-c", "trap '' TERM; setsid sleep 600 & echo orphan $!"])
print("guard", os.getppid(), "child", os.getpid(), flush=True)
try:
    {work}
except KeyboardInterrupt:
    guard.set_stop(guard.Stop.UNDER_WAY)
    print("ends in order", flush=True)
    {end}
    raise SystemExit(130)
"""
ABRUPT = "time.sleep(600)"
ORDERLY = "guard.set_stop(guard.Stop.IN_ORDER); print('serves', flush=True); time.sleep(600)"


class Started:
    """A program under a guard, and all processes that it has started."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
        )
        self.seen: list[str] = []
        self.family: list[psutil.Process] = []

    def wait_for(self, word: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append(line)
            if word in line:
                return
        raise AssertionError(f"{self.seen} {self.process.communicate()}")

    def number(self, word: str) -> int:
        words = "".join(self.seen).split()
        return int(words[words.index(word) + 1])

    def note_family(self) -> None:
        self.family = [psutil.Process(self.number(word)) for word in ("guard", "child", "orphan")]

    def left(self) -> list[psutil.Process]:
        return psutil.wait_procs(self.family, timeout=60)[1]


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start programs in a folder from which they find the package, and end what they leave."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    started: list[Started] = []

    def begin(work: str, end: str = "pass", before: tuple[str, ...] = (), **options: object) -> Started:
        program = tmp_path / "server.py"
        program.write_text(SERVER.format(work=work, end=end))
        one = Started([*before, sys.executable, str(program)], **options)
        started.append(one)
        one.wait_for("guard")
        one.note_family()
        if "serves" in work:
            one.wait_for("serves")
        return one

    yield begin
    for one in started:
        for process in one.family:
            if process.is_running():
                process.kill()
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize(
    ("work", "orderly", "number"),
    [
        pytest.param(ABRUPT, False, signal.SIGTERM, id="abrupt"),
        pytest.param(ORDERLY, True, signal.SIGINT, id="orderly"),
        pytest.param(ORDERLY, True, signal.SIGHUP, id="orderly, hang-up"),
        pytest.param(ABRUPT, False, signal.SIGINT, id="abrupt, Ctrl-C", marks=pytest.mark.slow),
        pytest.param(ABRUPT, False, signal.SIGHUP, id="abrupt, hang-up", marks=pytest.mark.slow),
        pytest.param(ORDERLY, True, signal.SIGTERM, id="orderly, terminated", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_everything_and_is_in_the_status(start, number, work, orderly):
    one = start(work)
    one.process.send_signal(number)
    one.process.send_signal(number)
    out, err = one.process.communicate(timeout=60)
    assert one.process.returncode == 128 + number and err == ""
    assert ("ends in order" in out) == orderly
    assert one.left() == []


BLOCKED = f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGINT}}); {ORDERLY}"


@pytest.mark.parametrize(
    ("work", "end"), [(BLOCKED, "pass"), (ORDERLY, "time.sleep(600)")], ids=["never interrupted", "never ends"]
)
def test_what_does_not_stop_is_killed_after_the_limit(start, work, end):
    one = start(work, end)
    one.process.terminate()
    _, err = one.process.communicate(timeout=60)
    assert one.process.returncode == 143 and err == "wan-serve: not ended after 2 s, killed what was left\n"
    assert one.left() == []


def test_a_signal_to_every_process_is_the_guards_business(start):
    """Systemd signals all processes of a service."""
    one = start(ORDERLY)
    os.kill(one.number("child"), signal.SIGTERM)
    os.kill(one.number("child"), signal.SIGHUP)
    one.process.terminate()
    out, err = one.process.communicate(timeout=60)
    assert one.process.returncode == 143 and "ends in order" in out and err == ""


def test_processes_of_the_child_can_be_terminated(start):
    """Ray's are started with a `preexec_fn`, and get SIGTERM when Ray ends."""
    one = start("p = subprocess.Popen(['sleep', '600'], preexec_fn=lambda: None); p.terminate(); sys.exit(-p.wait())")
    assert one.process.wait(60) == signal.SIGTERM


@pytest.mark.parametrize(("work", "status"), [("sys.exit(3)", 3), ("pass", 0)])
def test_the_status_of_a_child_is_handed_on_and_its_orphans_end(start, work, status):
    one = start(work)
    _, err = one.process.communicate(timeout=60)
    assert one.process.returncode == status and err == ""
    assert one.left() == []


def test_a_child_that_is_killed_is_one_line(start):
    one = start(ORDERLY)
    os.kill(one.number("child"), signal.SIGKILL)
    _, err = one.process.communicate(timeout=60)
    assert one.process.returncode == 137 and err == "wan-serve: the server was ended by SIGKILL\n"
    assert one.left() == []


@pytest.mark.parametrize(("work", "orderly"), [(ABRUPT, False), (ORDERLY, True)], ids=["abrupt", "orderly"])
def test_a_guard_that_is_killed_takes_everything_along(start, work, orderly):
    one = start(work)
    one.process.kill()
    out, err = one.process.communicate(timeout=60)
    assert ("ends in order" in out) == orderly and err == ""
    assert one.left() == []


def test_an_interruption_in_a_finaliser_is_not_lost(start):
    one = start(
        "guard.set_stop(guard.Stop.IN_ORDER); print('serves', flush=True)\n"
        "    class Slow:\n"
        "        def __del__(self): time.sleep(600)\n"
        "    Slow(); time.sleep(600)"
    )
    one.process.send_signal(signal.SIGINT)
    out, err = one.process.communicate(timeout=60)
    assert one.process.returncode == 130 and "ends in order" in out and err == ""


@pytest.mark.parametrize(
    ("shell", "stays"),
    [
        ('"$0" "$1"; true', False),
        ('nohup "$0" "$1"; true', True),
        ('setsid "$0" "$1"; true', True),
        ('"$0" "$1" & wait', True),
    ],
    ids=["plain", "nohup", "setsid", "background"],
)
def test_the_death_of_the_parent_ends_it_unless_it_was_meant_to_stay(start, shell, stays, tmp_path):
    one = start(ORDERLY, before=("sh", "-c", shell), cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert one.number("guard") != one.process.pid
    one.process.kill()
    if stays:
        time.sleep(1.5)  # three looks of the guard
        assert all(process.is_running() for process in one.family)
        os.kill(one.number("guard"), signal.SIGTERM)
    out, err = one.process.communicate(timeout=60)
    assert "ends in order" in out and "Traceback" not in err
    assert one.left() == []
