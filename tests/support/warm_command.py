"""`wan-serve` without the seconds of its imports: a process that has made them forks one that runs the command.

What runs is `serve_app.cli.main`, with arguments, environment, working folder and output of its own, and with all that
comes after it: exit functions, threads, the status. Tests of signals start a real command.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

import psutil

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_CHILD_SUBREAPER = 36


def run(
    *arguments: object,
    environment: dict[str, str] | None = None,
    imports: str = "serve_app.server",
    timeout_s: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run `wan-serve` with these arguments.

    Args:
        arguments: words of the command line.
        environment: of the process; by default this one's.
        imports: module that has been imported already.
        timeout_s: seconds after which it counts as hung.

    Raises:
        AssertionError: the command hung, or a process that it has started is left.
    """
    return _warm(imports).run([str(one) for one in arguments], dict(environment or os.environ), timeout_s)


@functools.cache
def _warm(imports: str) -> _Warm:
    return _Warm(imports)


class _Warm:
    """The client of a process that forks. The process ends when this one does, as its input ends then."""

    def __init__(self, imports: str) -> None:
        self._imports = imports
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.support.warm_command", self._imports]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self, arguments: list[str], environment: dict[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            outputs = [f"{folder}/stdout", f"{folder}/stderr"]
            order = {"arguments": arguments, "environment": environment, "cwd": str(Path.cwd()), "outputs": outputs}
            print(json.dumps(order), file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], timeout_s)[0]:
                for one in psutil.Process(self._process.pid).children(recursive=True):
                    one.kill()
                self._process.kill()
                self._start()
                raise AssertionError(f"`wan-serve {' '.join(arguments)}` did not end within {timeout_s} s")
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
            out, err = (Path(path).read_text() for path in outputs)
        assert not answer["left"], f"`wan-serve {' '.join(arguments)}` has left {answer['left']}"
        return subprocess.CompletedProcess(arguments, answer["status"], out, err)


def _serve(imports: str) -> None:
    """Run the commands that come in, one after the other."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what a command leaves is this process's child then
    importlib.import_module("serve_app.cli")
    importlib.import_module(imports)
    for line in sys.stdin:
        order = json.loads(line)
        if (pid := os.fork()) == 0:
            _become(order)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status, "left": _end_children()}), flush=True)


def _become(order: dict[str, Any]) -> NoReturn:
    """Be the command in this process, to the end."""
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    os.dup2(sys.stdin.fileno(), 0)
    for number, path in enumerate(order["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.argv = ["wan-serve", *order["arguments"]]
    from serve_app.cli import main

    status: Any = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status if isinstance(status, int) else 1)


def _end_children() -> list[str]:
    """Return the command lines of processes that are left, and end them."""
    left = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                left.append(" ".join(process.cmdline()))
                process.kill()
            process.wait(5)
    return left


if __name__ == "__main__":
    _serve(sys.argv[1])
