"""The services as the doctor sees them: real ones, and ones that are away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.config import QueueConfig, StorageConfig, validate
from serve_app.db.database import Database
from serve_app.doctor.finding import Finding, Level
from serve_app.doctor.services import services
from serve_app.launch import shipped
from serve_app.storage import Storage
from tests.support.brokers import queue_options
from tests.support.databases import empty_sqlite, empty_url, postgres_url, store_url

__all__ = ["empty_sqlite", "empty_url", "postgres_url", "queue_options", "store_url"]
NOWHERE = "http://127.0.0.1:1"


async def look(home: Path, url: str = "", **sections: Any) -> dict[str, Finding]:
    found = await services(validate({"home": str(home), **sections}), url)
    return {one.check: one for one in found}


async def test_real_services(
    tmp_path: Path, empty_url: str, s3_options: StorageConfig, queue_options: QueueConfig
) -> None:
    database = Database(empty_url)
    await database.start()
    await database.close()
    sections = {"store": {"url": empty_url}, "storage": s3_options.model_dump(), "queue": queue_options.model_dump()}
    found = await look(tmp_path, "", **sections)
    assert {one.level for one in found.values()} == {Level.ok}, found
    assert "answers in" in found["database"].said and "let us in after" in found["broker"].said
    assert f"stored, read and removed 1 MiB at {s3_options.url}" in found["storage"].said
    assert await Storage(s3_options).list("_check") == []


async def test_services_that_are_away(tmp_path: Path) -> None:
    found = await look(
        tmp_path,
        NOWHERE,
        store={"url": "postgresql://me:secret@127.0.0.1:1/wan"},
        storage={"url": "s3://bucket", "endpoint": NOWHERE, "retry_s": 0},
        queue={"transport": "rabbitmq", "url": "amqp://me:secret@127.0.0.1:1/"},
    )
    levels = {name: one.level for name, one in found.items()}
    # Jobs run without the broker, too.
    assert levels == {"database": "error", "storage": "error", "broker": "warning", "gateway": "error"}
    assert all(one.do for one in found.values()) and "secret" not in str(found)


async def test_looking_makes_and_changes_no_database(tmp_path: Path, empty_url: str) -> None:
    found = await look(tmp_path, store={"url": empty_url})
    if empty_url.startswith("sqlite"):
        assert "there is no database" in found["database"].said
    else:
        assert "its tables are at revision None, and this version has" in found["database"].said
        database = Database(empty_url)
        await database.connect()
        assert (await database.revisions())[0] is None
        await database.close()
    absent = await look(tmp_path)
    assert (absent["database"].level, absent["storage"].level) == (Level.error, Level.error)
    assert not (tmp_path / "jobs.db").exists() and not (tmp_path / "videos").exists()


@pytest.fixture
def home(tmp_path: Path, empty_sqlite: Path) -> Path:
    """A home with a database and a folder of videos."""
    (tmp_path / "home/videos").mkdir(parents=True)
    (tmp_path / "home/jobs.db").write_bytes(empty_sqlite.read_bytes())
    return tmp_path / "home"


def test_the_command_on_this_machine_alone(home: Path) -> None:
    content = yaml.safe_load((shipped.folder() / "tiny.yaml").read_text())
    args = content["applications"][0]["args"]
    args["home"] = str(home)
    for application in content["applications"]:
        application["args"] = args
    path = home / "my.yaml"
    path.write_text(yaml.safe_dump(content))
    command = ["doctor", "--config", str(path), "--offline", "--weights", "full"]
    said = CliRunner().invoke(cli, [*command, "--json"])
    report = json.loads(said.stdout)
    checks = {one["check"]: one["level"] for one in report["findings"]}
    assert set(checks) == {"database", "storage", "broker", "versions", "disk", "gpus", "weights"}
    del checks["disk"]  # the disk of whoever runs this
    assert set(checks.values()) == {"ok"}, report
    (home / "jobs.db").unlink()
    said = CliRunner().invoke(cli, command)
    assert said.exit_code == 1
    assert said.stdout.startswith("error ") and "database: store.url has value" in said.stdout.splitlines()[0]
    assert not (home / "jobs.db").exists()
