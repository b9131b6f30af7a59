"""Paths in a configuration: relative ones, and names with any character."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from serve_app.config import Config, below, load_file, placed, validate
from serve_app.db.database import Database
from serve_app.errors import ConfigError
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage

# Characters with a meaning in a URL, a format or a shell, and some that are not ASCII.
NAMES = (
    "50% off",
    "%41",
    "what?mode=ro",
    "a#b",
    "a&b=c+d",
    'it\'s "quoted"',
    "空 ümlaut é",
    "a;b:c@d",
    "[1]{2}*",
    "back\\slash",
    "%s%(here)s",
    " ~ ",
)


def write(folder: Path, args: dict[str, object]) -> Path:
    path = folder / "app.yaml"
    applications = [
        {"name": "wan", "import_path": "serve_app.app:wan", "route_prefix": None, "args": args},
        {"name": "gateway", "import_path": "serve_app.app:gateway", "args": args},
    ]
    path.write_text(yaml.safe_dump({"applications": applications}))
    return path


def test_what_a_file_names_is_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "files", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    path = write(
        folder,
        {
            "home": "state",
            "model": {"path": "../models/wan", "sharded": "shards"},
            "store": {"url": "sqlite:///db/jobs.db"},
            "storage": {"url": "./videos"},
            "webhooks": {"ca_file": "ca.pem"},
            "mail": {"host": "mail.test", "sender": "a@b.test", "ca_file": "~/ca.pem"},
        },
    )
    monkeypatch.chdir(elsewhere)
    for given in (path, Path(os.path.relpath(path))):
        content, config = load_file(given)
        assert config.home_path.resolve() == folder / "state"
        assert config.model.folder.resolve() == tmp_path / "models" / "wan" and config.model.folder.is_absolute()
        assert config.model.sharded_folder is not None and config.model.sharded_folder.resolve() == folder / "shards"
        assert (Database(config.store_url).file or Path()).resolve() == folder / "db" / "jobs.db"
        assert Storage(config.storage_options).folder.resolve() == folder / "videos"
        assert Path(config.webhooks.ca_file).resolve() == folder / "ca.pem"
        assert config.mail is not None and config.mail.ca_file == str(Path.home() / "ca.pem")
        # All processes get these paths, whatever their working folder.
        assert [validate(application["args"]) for application in content["applications"]] == [config, config]


def test_the_default_home_is_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "files").mkdir()
    path = write(tmp_path / "files", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WAN_SERVE_HOME", raising=False)
    assert load_file(path)[1].home == str(tmp_path / "data")
    monkeypatch.setenv("WAN_SERVE_HOME", "mine")
    assert load_file(path)[1].home == str(tmp_path / "mine")
    monkeypatch.setenv("WAN_SERVE_HOME", "~/mine")
    config = load_file(path)[1]
    assert config.home == str(Path.home() / "mine") and config.model.path == "tiny"
    content = yaml.safe_load(path.read_text())
    for application in content["applications"]:
        application["runtime_env"] = {"env_vars": {"WAN_SERVE_HOME": "/of/the/file"}}
    path.write_text(yaml.safe_dump(content))
    assert load_file(path)[1].home == "/of/the/file"


def test_what_is_no_path_stays(tmp_path: Path) -> None:
    for store in ("postgresql://me:p%40ss@db/wan", "postgres://db/wan?sslmode=require", "sqlite://", "nonsense"):
        config = placed(validate({"store": {"url": store}, "storage": {"url": "s3://bucket/p"}}), below(tmp_path))
        assert (config.store.url, config.storage.url, config.model.path) == (store, "s3://bucket/p", "tiny")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^home has value '~nobody-at-all/x', expected a path: that user has no home folder"
    ):
        placed(validate({"home": "~nobody-at-all/x"}), below(tmp_path))
    for url in ("s3://bucket/x", "file:///x"):
        with pytest.raises(ConfigError, match=f"home is '{url}', expected a folder"):
            validate({"home": url})
    with pytest.raises(ConfigError, match="url has value 'file://videos', expected file:///folder"):
        validate({"storage": {"url": "file://videos"}})


def test_a_file_url(tmp_path: Path) -> None:
    url = (tmp_path / "my videos 100%").as_uri()
    assert Storage(validate({"storage": {"url": url}}).storage_options).folder == tmp_path / "my videos 100%"
    config = placed(validate({"storage": {"url": url}}), below(Path("/unused")))
    assert Storage(config.storage_options).folder == tmp_path / "my videos 100%"


@pytest.mark.parametrize("name", NAMES)
async def test_a_home_of_any_name(tmp_path: Path, name: str) -> None:
    config = placed(Config(home=name), below(tmp_path))
    store = JobStore.of(config)
    await store.start()
    await store.pause()
    await store.close()
    storage = Storage(config.storage_options)
    await storage.put("runs/1/video.mp4", b"bytes")
    assert await storage.get("runs/1/video.mp4") == b"bytes" and await storage.list("runs") == ["runs/1/video.mp4"]
    assert (await storage.stat("runs/1/video.mp4")).size == 5
    assert [chunk async for chunk in storage.stream("runs/1/video.mp4")] == [b"bytes"]
    assert (tmp_path / name / "videos/runs/1/video.mp4").read_bytes() == b"bytes"
    await storage.delete_prefix("runs/1")
    with os.scandir(tmp_path) as entries:
        assert [entry.name for entry in entries] == [name]
    assert (tmp_path / name / "jobs.db").is_file()
    assert Database(config.store_url).file == tmp_path / name / "jobs.db"


async def test_homes_with_a_common_beginning_have_jobs_of_their_own(tmp_path: Path) -> None:
    first, second = (JobStore.of(Config(home=str(tmp_path / name))) for name in ("home?1", "home?2"))
    await first.start()
    await second.start()
    await first.pause()
    assert await second.paused_since() is None
    await first.close()
    await second.close()
