"""A PostgreSQL of a test's own that asks for passwords; the shared one trusts everybody."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

USER, PASSWORD = "wan", "right"
_STARTS_WITHIN_S = 60
# Ends the server when its input does: when the fixture closes it, or this process has gone, however it went.
_UNTIL_CLOSED = '"$@" & cat; kill -INT $!; wait'


@pytest.fixture(scope="session")
def strict_postgres() -> Iterator[int]:
    """Yield the port of a server that knows `USER` by `PASSWORD`."""
    try:
        import asyncpg  # noqa: F401

        programs, who = _programs(), _who()
    except (ImportError, LookupError) as error:
        reason = f"a PostgreSQL of its own cannot be started: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="wan-test-postgres-"))  # pytest's own are closed to other users
    try:
        (folder / "password").write_text(PASSWORD)
        for path in (folder, folder / "password"):
            os.chown(path, who.get("user", -1), who.get("group", -1))
        method = ["--auth=scram-sha-256", f"--username={USER}", f"--pwfile={folder}/password"]
        make: list[Any] = [
            programs / "initdb",
            f"--pgdata={folder}/data",
            *method,
            "--no-sync",
            "--no-locale",
            "--encoding=UTF8",
        ]
        subprocess.run(make, **who, cwd=folder, check=True, capture_output=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        options = ("listen_addresses=127.0.0.1", f"port={port}", "unix_socket_directories=", "fsync=off")
        serve: list[Any] = [
            programs / "postgres",
            "-D",
            folder / "data",
            *(part for option in options for part in ("-c", option)),
        ]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                ["sh", "-c", _UNTIL_CLOSED, "sh", *serve],
                **who,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is for the tests
            )
        try:
            _wait(port, folder / "log")
            yield port
        finally:
            server.communicate(timeout=30)
    finally:
        shutil.rmtree(folder)


def _programs() -> Path:
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version)
    if not places:
        raise LookupError("initdb is neither on the PATH nor under /usr/lib/postgresql")
    return places[-1]


def _version(programs: Path) -> float:
    return float(programs.parent.name)


def _who() -> dict[str, Any]:
    """Return the user that runs it, since it refuses root."""
    if os.geteuid() != 0:
        return {}
    try:
        entry = pwd.getpwnam("postgres")
    except KeyError:
        raise LookupError("it does not run as root, and there is no user postgres") from None
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _wait(port: int, log: Path) -> None:
    import asyncpg

    async def answers() -> None:
        connection = await asyncpg.connect(f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres", timeout=5)
        await connection.close()

    deadline = time.monotonic() + _STARTS_WITHIN_S
    while True:
        try:
            return asyncio.run(answers())
        except (OSError, TimeoutError, asyncpg.CannotConnectNowError):
            if time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not answer: {log.read_text(errors='replace')}") from None
            time.sleep(0.05)
