"""A real S3 server on loopback, which checks signatures, expiry and preconditions: OpenStack Swift with its s3api.

Four processes (account, container, object, proxy) over one folder. `S3Server` can be killed and started again at the
same address with what it holds; a test that hurts it starts one of its own.
"""

from __future__ import annotations

import importlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest
from obstore.store import S3Store

from serve_app import config
from serve_app.storage import Storage
from tests.support.plain_http import http

ACCESS_KEY = "test:tester"
SECRET_KEY = "testing"
REGION = "us-east-1"
_SERVERS = ("account", "container", "object", "proxy")
_STARTS_WITHIN_S = 60

_RINGS = """
import sys
from typing import Any
from swift.common.ring import RingBuilder
for argument in sys.argv[1:]:
    file, port = argument.split("=")
    builder = RingBuilder(1, 1, 0)
    device = {"region": 1, "zone": 1, "weight": 1, "device": "d1", "ip": "127.0.0.1", "port": int(port)}
    builder.add_dev({**device, "replication_ip": "127.0.0.1", "replication_port": int(port)})
    builder.rebalance()
    builder.get_ring().save(file)
"""
_COMMON = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
fallocate_reserve = 0
workers = 0
# A listing is of the moment, however busy the machine: an update that gives up would come later, or never.
container_update_timeout = 30
"""
_BACKEND = """
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
_PROXY = """
[pipeline:main]
pipeline = catch_errors healthcheck cache listing_formats s3api tempauth bulk slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
conn_timeout = 5
node_timeout = 30
error_suppression_limit = 1000000
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


class S3Server:
    """The server of a folder, which has to be on a file system with user attributes.

    Raises:
        RuntimeError: it cannot be started here; the message says why.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = {name: _free_port() for name in _SERVERS}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._guard: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._ports['proxy']}"
        self._check()
        self._configure()
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers. Without effect while it runs."""
        if self._processes:
            return
        for name in _SERVERS:
            script = Path(sys.executable).with_name(f"swift-{name}-server")
            with (self.folder / f"{name}.log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, str(script), str(self.folder / f"{name}.conf"), "-v"],
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        # Ends them when this process has gone, however it went: its end of the pipe is then closed.
        ids = [str(process.pid) for process in self._processes]
        self._guard = subprocess.Popen(
            ["sh", "-c", "cat; kill -9 $@", "sh", *ids],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while not self._answers():
            dead = [name for name, process in zip(_SERVERS, self._processes, strict=True) if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                self.stop()
                name = (dead or ["proxy"])[0]
                lines = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
                raise RuntimeError(f"Swift's {name} server did not start: {(lines or ['no output'])[-1]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill it; what it acknowledged stays in the folder."""
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait(timeout=10)
        self._processes.clear()
        if self._guard is not None:
            self._guard.kill()  # before it can take the ids of the dead for those of others
            self._guard.communicate()
            self._guard = None

    def freeze(self) -> None:
        """Take connections, but answer nothing until `thaw`."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    @property
    def port(self) -> int:
        """The port at which it listens."""
        return self._ports["proxy"]

    def stored_files(self) -> int:
        """Return how many files it holds; each part of an unfinished upload is one."""
        return sum(1 for _ in (self.folder / "devices").rglob("*.data"))

    def make_bucket(self) -> str:
        """Make an empty bucket, and return its name."""
        bucket = f"test-{secrets.token_hex(6)}"
        http.put(self.sign("PUT", bucket, "")).raise_for_status()
        return bucket

    def sign(self, method: Any, bucket: str, key: str, expires_s: int = 60) -> str:
        """Return a presigned URL, made without the code under test."""
        store = S3Store(
            bucket,
            endpoint=self.endpoint,
            region=REGION,
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            client_options={"allow_http": True},
        )
        return str(obstore.sign(store, method, key, timedelta(seconds=expires_s)))

    def options(self, bucket: str, prefix: str = "", **options: object) -> config.StorageConfig:
        """Return the configuration section of a bucket here; credentials come from `s3_credentials`."""
        url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        return config.StorageConfig.model_validate({"url": url, "endpoint": self.endpoint, "region": REGION, **options})

    def _check(self) -> None:
        try:
            for name in ("swift", "pyeclib.ec_iface"):
                importlib.import_module(name)
        except ImportError as error:
            raise RuntimeError(f"Swift cannot be imported: {error}") from None
        try:
            os.setxattr(self.folder, "user.test", b"1")
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"{self.folder} takes no user attributes: {error}") from None

    def _configure(self) -> None:
        (self.folder / "devices" / "d1").mkdir(parents=True)
        (self.folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = tests\n")
        for name in _SERVERS:
            common = _COMMON.format(port=self._ports[name], user=_user(), folder=self.folder)
            rest = _PROXY if name == "proxy" else _BACKEND.format(name=name)
            (self.folder / f"{name}.conf").write_text(common + rest)
        rings = [f"{self.folder / name}.ring.gz={self._ports[name]}" for name in _SERVERS if name != "proxy"]
        done = subprocess.run([sys.executable, "-c", _RINGS, *rings], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"Swift's rings cannot be made: {(done.stderr.splitlines() or ['no output'])[-1]}")

    def _answers(self) -> bool:
        for port in self._ports.values():
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                return False
        with suppress(httpx.HTTPError):
            return http.get(f"{self.endpoint}/healthcheck", timeout=1).status_code == 200
        return False

    def _signal(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # without effect on one that has been waited for


def start_server(folder: Path) -> S3Server:
    """Start a server; where there is none the test fails with CI=true, and is skipped else."""
    try:
        return S3Server(folder)
    except RuntimeError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Yield one server for all tests that leave it running."""
    server = start_server(tmp_path_factory.mktemp("swift"))
    yield server
    server.stop()


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of somebody who may use the server, and nothing else of AWS in it."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture
def s3_options(s3_server: S3Server, s3_credentials: None) -> config.StorageConfig:
    """Return the configuration section of an empty bucket."""
    return s3_server.options(s3_server.make_bucket(), "some/prefix")


@pytest.fixture
def s3_storage(s3_options: config.StorageConfig) -> Storage:
    return Storage(s3_options)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.geteuid()).pw_name
