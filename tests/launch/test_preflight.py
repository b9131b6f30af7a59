"""Mistakes of newcomers, on the command line: each is soon answered by one line and leaves nothing behind.

No test here gets as far as starting Ray: that nothing was started is part of what is tested.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app import config
from serve_app.config import Config, StorageConfig, StoreConfig, validate
from serve_app.errors import without_password
from serve_app.launch.preflight import preflight
from tests.support.brokers import SERVER as BROKER
from tests.support.brokers import queue_options
from tests.support.databases import SERVER, postgres_url
from tests.support.deployed import REPOSITORY
from tests.support.disks import Disk, small_disk
from tests.support.ports import free_port
from tests.support.private_postgres import PASSWORD, USER, strict_postgres
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server
from tests.support.warm_command import run

__all__ = ["postgres_url", "queue_options", "small_disk", "strict_postgres"]

Args = dict[str, Any]
Change = Callable[[Args, Args], object]
KEYS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Change], Path]:
    """Return a function that writes a changed copy of configs/tiny.yaml. The change gets the file and the `args`."""

    def write(change: Change) -> Path:
        content = yaml.safe_load((REPOSITORY / "configs/tiny.yaml").read_text())
        content["http_options"]["port"] = free_port()
        args = content["applications"][0]["args"]
        args["home"] = str(tmp_path / "home")
        change(content, args)
        for application in content["applications"]:
            application["args"] = args
        path = tmp_path / "my.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True))
        return path

    return write


def refused(*command: object, **environment: str) -> str:
    """Run a command that refuses and leaves nothing, and return its one line."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WAN_SERVE", "RAY_ADD"))}
    done = run(*command, environment={**clean, **environment})
    assert done.returncode in (1, 2), done
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("wan-serve: "), done.stderr
    assert "starting Ray" not in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert "secret" not in done.stdout + done.stderr
    return done.stderr.removeprefix("wan-serve: ").strip()


def test_postgresql(file: Callable[[Change], Path], postgres_url: str, silent: int) -> None:
    for url, said in (
        ("postgresql://me:secret@127.0.0.1:1/wan", "127.0.0.1:1/wan': cannot be opened: [Errno 111] Connect call"),
        (f"postgresql://me:secret@127.0.0.1:{silent}/wan", f"{silent}/wan': cannot be opened: no answer within 10 s"),
        (f"{SERVER.rpartition('/')[0]}/no_such_database", 'cannot be opened: database "no_such_database" does not'),
        ("postgres//me:secret@db/wan", "has value 'postgres//me:***@db/wan', expected postgresql://"),
        ("postgresql://me:se@secret@127.0.0.1:1/wan", "has value 'postgresql://me:***@127.0.0.1:1/wan': cannot be"),
        ("postgresql://127.0.0.1:1/wan?password=secret", "has value 'postgresql://127.0.0.1:1/wan?password=***': "),
    ):
        path = file(lambda _, args, url=url: args.update(store={"url": url}))
        line = refused("up", path, "--own-ray")
        assert line.startswith("store.url has value '") and said in line, line


async def test_a_password_that_postgresql_refuses(
    file: Callable[[Change], Path], tmp_path: Path, strict_postgres: int
) -> None:
    server = f"127.0.0.1:{strict_postgres}/postgres"
    path = file(lambda _, args: args.update(store={"url": f"postgresql://{USER}:secret@{server}"}))
    said = f'cannot be opened: password authentication failed for user "{USER}"'
    for command in (("up", path, "--own-ray"), ("jobs", "status", "--config", path)):
        assert refused(*command) == f"store.url has value 'postgresql://{USER}:***@{server}': {said}"
    right = StoreConfig(url=f"postgresql://{USER}:{PASSWORD}@{server}")
    assert await preflight(Config(home=str(tmp_path), store=right, storage=StorageConfig(min_free_mib=0))) == []


def test_s3(file: Callable[[Change], Path], s3_server: S3Server, silent: int) -> None:
    bucket, absent, there = s3_server.make_bucket(), "no-such-bucket", s3_server.endpoint
    for name, endpoint, keys, said in (
        (absent, there, KEYS, f"at {there}: 404 NoSuchBucket"),
        (bucket, there, {**KEYS, "AWS_SECRET_ACCESS_KEY": "wrong"}, "403 SignatureDoesNotMatch"),
        (bucket, there, {**KEYS, "AWS_ACCESS_KEY_ID": "wrong"}, "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"),
        (bucket, "http://127.0.0.1:1", KEYS, "at http://127.0.0.1:1: cannot connect (storage.endpoint)"),
        (bucket, f"http://127.0.0.1:{silent}", KEYS, "no answer within 5 s (storage.endpoint, storage.timeout_s)"),
    ):
        options = {"url": f"s3://{name}", "endpoint": endpoint, "region": "us-east-1"}
        path = file(lambda _, args, options=options: args.update(storage=options))
        line = refused("up", path, "--own-ray", **keys)
        assert line.startswith(f"storage.url has value 's3://{name}': ") and said in line, line


def test_keys_of_s3_may_stand_in_the_file(file: Callable[[Change], Path], s3_server: S3Server) -> None:
    """The keys may stand where docs/howto/s3.md says: they are looked for where the replicas look."""

    def change(content: Args, args: Args) -> None:
        args["storage"] = {"url": "s3://no-such-bucket", "endpoint": s3_server.endpoint}
        for application in content["applications"]:
            application["runtime_env"] = {"env_vars": KEYS}

    assert "404 NoSuchBucket" in refused("up", file(change), "--own-ray")

    def differ(content: Args, _: Args) -> None:
        content["applications"][0]["runtime_env"] = {"env_vars": KEYS}

    assert "the applications' `runtime_env` differ" in refused("up", file(differ), "--own-ray")


def test_rabbitmq(file: Callable[[Change], Path]) -> None:
    path = file(lambda _, args: args.update(queue={"transport": "rabbitmq"}))
    assert refused("up", path, "--own-ray") == "queue.url has value '', expected amqp://user:password@host:5672/vhost"
    line = refused("up", path, "--own-ray", WAN_SERVE_QUEUE_URL="http://me:secret@mq")
    assert line == "queue.url has no URL of RabbitMQ, expected amqp://user:password@host:5672/vhost"


async def test_a_password_that_rabbitmq_refuses(
    file: Callable[[Change], Path], tmp_path: Path, queue_options: config.QueueConfig
) -> None:
    """A broker that is away may come back; one that refuses the user will not."""
    url = BROKER.replace(":guest@", ":secret@")
    path = file(lambda _, args: args.update(queue={"transport": "rabbitmq"}))
    line = refused("up", path, "--own-ray", WAN_SERVE_QUEUE_URL=url)
    assert line == f"queue.url has value '{without_password(url)}': the broker refused this user and password"
    assert await preflight(Config(home=str(tmp_path), queue=queue_options, storage=StorageConfig(min_free_mib=0))) == []


@pytest.mark.parametrize("vhost", ["nowhere", "%2Fno%2Fwhere"])
def test_a_vhost_that_rabbitmq_does_not_have(file: Callable[[Change], Path], vhost: str) -> None:
    url = BROKER.rstrip("/") + f"/{vhost}"
    path = file(lambda _, args: args.update(queue={"transport": "rabbitmq"}))
    line = refused("up", path, "--own-ray", WAN_SERVE_QUEUE_URL=url)
    assert line == f"queue.url has value '{without_password(url)}': the broker has no such vhost, or not for this user"


async def test_a_broker_that_is_away_keeps_nobody_from_starting(tmp_path: Path, silent: int) -> None:
    for port, why in ((1, "AMQPConnectionError"), (silent, "no answer within 5 s")):
        queue = {"transport": "rabbitmq", "url": f"amqp://me:secret@127.0.0.1:{port}/"}
        (line,) = await preflight(validate({"home": str(tmp_path), "queue": queue, "storage": {"min_free_mib": 0}}))
        assert line.startswith(f"queue.url: the broker is away ({why}") and "jobs run all the same" in line
        assert "secret" not in line


def test_home(file: Callable[[Change], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    expected = "expected a folder that can be written to"
    for home in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/below")):
        line = refused("up", file(lambda _, args, home=home: args.update(home=str(home))), "--own-ray")
        assert line.startswith(f"home has value '{home}', {expected}"), line
        line = refused("up", file(lambda _, args: args.pop("home")), "--own-ray", WAN_SERVE_HOME=str(home))
        assert line.startswith(f"WAN_SERVE_HOME has value '{home}', {expected}"), line


def test_a_disk_that_cannot_be_written_to(file: Callable[[Change], Path], tmp_path: Path, small_disk: Disk) -> None:
    path = file(lambda _, args: None)
    small_disk.fill()
    line = refused("up", path, "--own-ray")
    assert f"{tmp_path}/home/jobs.db': cannot be opened: " in line and "full" in line, line
    subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
    assert refused("up", path, "--own-ray").startswith(f"home has value '{tmp_path}/home', expected a folder that can")


async def test_a_disk_with_little_space_and_keys_that_are_not_there(tmp_path: Path) -> None:
    options = {"home": str(tmp_path), "storage": {"min_free_mib": 1e12}, "auth": {"mode": "keys"}}
    keys, space = await preflight(validate(options))
    assert "`wan-serve keys create` makes one" in keys
    assert "expected 1e+12 (storage.min_free_mib): until then no job is accepted" in space


async def test_nothing_to_say(tmp_path: Path, postgres_url: str, s3_server: S3Server, s3_credentials: None) -> None:
    assert await preflight(Config(home=str(tmp_path), storage=StorageConfig(min_free_mib=0))) == []
    bucket = s3_server.options(s3_server.make_bucket())
    assert await preflight(Config(home="/proc/unused", store=StoreConfig(url=postgres_url), storage=bucket)) == []


def test_model(file: Callable[[Change], Path], tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path, Path(sys.executable)):
        line = refused("up", file(lambda _, args, path=path: args["model"].update(path=str(path))), "--own-ray")
        assert line.startswith(f"model.path has value '{path}': {path}"), line
        assert line.endswith("expected a Wan2.2 checkpoint in the diffusers layout")


def test_port(file: Callable[[Change], Path], silent: int) -> None:
    line = refused("up", file(lambda content, _: content["http_options"].update(port=silent)), "--own-ray")
    assert line.startswith(f"http_options.port has value {silent} and http_options.host '127.0.0.1', expected"), line
    path = file(lambda *_: None)
    assert "Address already in use" in refused("up", path, "--own-ray", "--port", silent)


def test_commands_on_a_database_that_is_not_there(file: Callable[[Change], Path], tmp_path: Path) -> None:
    path = file(lambda *_: None)
    for command in (("jobs", "status"), ("jobs", "list"), ("keys", "list"), ("keys", "revoke", "0123")):
        line = refused(*command, "--config", path)
        assert line.startswith(f"home has value '{tmp_path}/home': there is no database '{tmp_path}/home/jobs.db'"), (
            line
        )
    assert not (tmp_path / "home").exists()
    path = file(lambda _, args: args.update(store={"url": "postgresql://me:secret@127.0.0.1:1/wan"}))
    for command in (("jobs", "status"), ("keys", "list"), ("keys", "create", "me")):
        assert refused(*command, "--config", path).startswith("store.url has value 'postgresql")


def test_generate_against_nothing(tmp_path: Path) -> None:
    port = free_port()
    for url in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid", "127.0.0.1:8000", "ftp://x", "http://[x"):
        line = refused("generate", "a cat", "--url", url, "-o", tmp_path / "out.mp4")
        assert line.startswith(f"--url has value '{url}', expected"), line
    assert "--steps" in refused("generate", "a cat", "--steps", "many")
    line = refused("generate", "a cat", "-o", tmp_path / "nowhere" / "out.mp4")
    assert line.startswith(f"--out has value '{tmp_path}/nowhere/out.mp4', expected a file in a folder that is there")
    assert not (tmp_path / "out.mp4").exists()
