"""Servers to be killed and started again: PostgreSQL and RabbitMQ from Debian's packages, on loopback.

S3 is `tests.support.s3.S3Server`. Each keeps what it acknowledged in its folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.ports import free_port

_STARTS_WITHIN_S = 60


class Server(ABC):
    """A server process, started in a session of its own.

    Args:
        folder: holds its data and its log.
        port: its port on 127.0.0.1.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and wait until it answers.

        Raises:
            RuntimeError: it does not; the message has the last line of its log.
        """
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while True:
            if self._process is None or self._process.poll() is not None:  # the first try may meet its own remains
                with (self.folder / "log").open("ab") as log:
                    self._process = subprocess.Popen(
                        self._command(), env=self._environment(), stdout=log, stderr=log, start_new_session=True
                    )
            if self._answers():
                return
            if time.monotonic() > deadline:
                lines = (self.folder / "log").read_text(errors="replace").splitlines() or ["no output"]
                raise RuntimeError(f"{type(self).__name__} did not start: {lines[-1]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Send SIGKILL to the server and all that it started."""
        if self._process is None:
            return
        family = []
        with suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._process.pid)
            family = [own, *own.children(recursive=True)]
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        self._process.wait()
        psutil.wait_procs(family, timeout=10)
        self._process = None

    @abstractmethod
    def _command(self) -> list[str]:
        """Return the command that starts the server."""

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False


class Postgres(Server):
    """PostgreSQL with an empty database `wan` that the user `wan` may use without a password."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, free_port())
        self._bin = _folder_of("initdb", "/usr/lib/postgresql/*/bin")
        # It refuses to run as root.
        self._as = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        folder.mkdir(parents=True, exist_ok=True)
        if self._as:
            shutil.chown(folder, "postgres", "postgres")
        data = str(folder / "data")
        self._run("initdb", "-D", data, "-U", "wan", "-A", "trust", "--no-sync", "-E", "UTF8")
        self.start()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "wan", "wan")
        self.url = f"postgresql://wan@127.0.0.1:{self.port}/wan"

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as, str(self._bin / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")

    def _command(self) -> list[str]:
        options = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder)]
        return [*self._as, str(self._bin / "postgres"), "-D", str(self.folder / "data"), *options]

    def _answers(self) -> bool:
        ready = [str(self._bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(ready, check=False).returncode == 0


class RabbitMQ(Server):
    """RabbitMQ with its user `guest`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, free_port())
        self._bin = _folder_of("rabbitmq-server", "/usr/lib/rabbitmq/bin")
        self._links = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plugins").write_text("[].")
        # A file of its own, else the machine's decides where it listens.
        (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{self.port}\n")
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/"
        self.start()

    def _command(self) -> list[str]:
        return [str(self._bin / "rabbitmq-server")]

    def _environment(self) -> dict[str, str]:
        folder = str(self.folder)
        return {
            **os.environ,
            "HOME": folder,  # of the cookie
            "RABBITMQ_NODENAME": f"chaos{self.port}@localhost",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_DIST_PORT": str(self._links),
            "RABBITMQ_MNESIA_BASE": f"{folder}/mnesia",
            "RABBITMQ_LOG_BASE": f"{folder}/logs",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/none",
        }

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2) as link:
            link.settimeout(2)
            link.sendall(b"AMQP\0\0\x09\x01")
            return bool(link.recv(7))
        return False


def _folder_of(program: str, pattern: str) -> Path:
    found = sorted(Path("/").glob(f"{pattern[1:]}/{program}"))
    if not found:
        raise RuntimeError(f"{program} is not installed, expected below {pattern}")
    return found[-1].parent
