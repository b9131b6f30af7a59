"""Claims of servers on one host: no two serve on the same Ray or port, and each can name the others.

A claim is a locked file. The lock ends with its process, however that ends, so no claim is ever stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from serve_app.errors import ServeAppError
from serve_app.launch import guard

# Longer than the time that a guard gives its server to stop.
_END_S = guard.LIMIT_S + 20


@dataclass(frozen=True)
class Running:
    """The description of a running server, for servers that start later."""

    applications: list[str]
    file: str
    url: str
    pid: int
    since: float  # start time of the process: with the pid it names one process, also when pids are used again
    ray: str = ""  # host:port of the Ray's control process, once it is known

    def __str__(self) -> str:
        where = f" on the Ray at {self.ray}" if self.ray else ""
        names = " and ".join(repr(name) for name in self.applications)
        return f"applications {names} of {self.file} at {self.url}{where}, pid {self.pid}"


def describe(applications: list[str], file: str, url: str) -> Running:
    """Return the description of the server in this process."""
    pid = guard.pid()
    return Running(applications, file, url, pid, psutil.Process(pid).create_time())


class ServerClaim:
    """The right to serve on a Ray or a port. It lasts until the process ends or `release` is called.

    Args:
        what: the Ray or the port, in words.
        server: the server that claims it.
        replace: first end the server that holds it.

    Raises:
        ServeAppError: another server holds it. The message names that server and what can be done.
    """

    def __init__(self, what: str, server: Running, *, replace: bool = False) -> None:
        self._path = _folder() / (re.sub(r"[^\w.:-]", "_", what) + ".json")
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not self._lock():
                self._refuse_or_end(what, replace)
        except BaseException:
            os.close(self._file)
            raise
        self.update(server)

    def update(self, server: Running) -> None:
        """Replace the description of the holder."""
        content = json.dumps(asdict(server)).encode()
        os.pwrite(self._file, content, 0)
        os.ftruncate(self._file, len(content))

    def release(self) -> None:
        """Give the claim up."""
        os.close(self._file)

    def _lock(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _refuse_or_end(self, what: str, replace: bool) -> None:
        holder = self._holder()
        if holder is None:
            raise ServeAppError(f"another `wan-serve up` is starting for {what}: wait for it, or end it")
        if not replace:
            raise refusal(holder)
        end(holder)
        deadline = time.monotonic() + _END_S
        while not self._lock():
            if time.monotonic() > deadline:
                raise ServeAppError(f"--replace: the running server did not end: {holder}")
            time.sleep(0.1)

    def _holder(self) -> Running | None:
        """Return the holder, or None if it does not show itself within a second.

        Between locking and writing, the file may still describe an earlier holder.
        """
        for _ in range(20):
            holder = _read(self._path)
            if holder is not None and _alive(holder):
                return holder
            time.sleep(0.05)
        return None


def refusal(server: Running) -> ServeAppError:
    """Return the error for a server whose place another one holds."""
    return ServeAppError(
        f"a server runs here already: {server}; end it, replace it with --replace, or serve beside it with --own-ray "
        "and another --port"
    )


def end(server: Running) -> None:
    """Ask a server to stop, and wait until its process has ended.

    Raises:
        ServeAppError: it does not end.
    """
    if not _alive(server):
        return
    try:
        process = psutil.Process(server.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(_END_S)
    except psutil.NoSuchProcess:
        return
    except psutil.Error as error:
        raise ServeAppError(f"--replace: cannot end the running server: {server}: {error}") from None


def running() -> Iterator[Running]:
    """Yield the servers of this user on this host, each once, though it holds a claim for its Ray and for its port."""
    seen = set()
    for path in sorted(_folder().glob("*.json")):
        server = _read(path)
        if server is not None and _alive(server) and server.pid not in seen:
            seen.add(server.pid)
            yield server


def _alive(server: Running) -> bool:
    try:
        return abs(psutil.Process(server.pid).create_time() - server.since) <= 1
    except psutil.NoSuchProcess:
        return False


def _read(path: Path) -> Running | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Running(**json.loads(path.read_bytes()))
    return None


def _folder() -> Path:
    """Return the user's folder of claims, beside the folder of Ray's sessions. Nobody else can write to it."""
    folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / f"wan-serve-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ServeAppError(f"{folder} belongs to somebody else, expected a folder of this user")
    return folder
