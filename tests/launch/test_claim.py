"""Claims between real processes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve_app.errors import ServeAppError
from serve_app.launch import claim

HOLDER = """
import sys, time
from serve_app.launch import claim
server = claim.describe(["wan", "gateway"], "my.yaml", "http://127.0.0.1:8000")
claims = [claim.ServerClaim(what, server) for what in ("the Ray of this machine", "port 8000")]
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture
def holder(_folder):
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def mine() -> claim.Running:
    return claim.describe(["wan"], "other.yaml", "http://127.0.0.1:8000")


def test_a_second_server_is_told_what_runs_and_where(holder):
    with pytest.raises(ServeAppError) as refused:
        claim.ServerClaim("port 8000", mine())
    said = str(refused.value)
    for part in ("'wan' and 'gateway'", "my.yaml", "http://127.0.0.1:8000", f"pid {holder.pid}", "--replace"):
        assert part in said
    assert "\n" not in said
    claim.ServerClaim("port 8001", mine()).release()
    assert [server.pid for server in claim.running()].count(holder.pid) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_claim_ends_with_its_process(holder, how):
    holder.send_signal(how)
    holder.wait()
    claim.ServerClaim("port 8000", mine()).release()
    assert holder.pid not in [server.pid for server in claim.running()]


def test_replace_ends_the_server_that_runs(holder):
    held = claim.ServerClaim("port 8000", mine(), replace=True)
    assert holder.wait(10) is not None
    held.release()


def test_a_pid_that_is_used_again_is_not_signalled(holder):
    claim.end(dataclasses.replace(mine(), pid=holder.pid, since=time.time() - 1000))
    assert holder.poll() is None


def test_of_servers_that_start_at_the_same_moment_one_wins(tmp_path):
    program = HOLDER.replace("import sys, time", "import sys, time; sys.stdin.readline()")
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        for rival in rivals:
            rival.stdin.write("\n")
            rival.stdin.flush()
        deadline = time.monotonic() + 60
        while sum(rival.poll() is None for rival in rivals) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sum(rival.poll() is None for rival in rivals) == 1
    finally:
        for rival in rivals:
            rival.kill()
    said = [rival.communicate() for rival in rivals]
    assert sum(out == "held\n" for out, _ in said) == 1
    assert sum("a server runs here already" in err or "is starting" in err for _, err in said) == 3


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / f"wan-serve-{os.getuid()}").symlink_to("/")
    with pytest.raises(ServeAppError, match="belongs to somebody else"):
        claim.ServerClaim("port 8000", mine())
