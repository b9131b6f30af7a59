"""`wan-serve canary` and `wan-serve generations` on a database that nothing is served from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from serve_app.cli import cli
from serve_app.errors import ServeAppError
from serve_app.jobs.store import JobStore
from tests.support.databases import on_store
from tests.support.fakes import PARAMS

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"


@pytest.fixture
def config(tmp_path: Path, empty_sqlite: Path) -> Path:
    content = yaml.safe_load(TINY.read_text())
    for application in content["applications"]:
        application["args"]["home"] = str(tmp_path)
    (tmp_path / "jobs.db").write_bytes(empty_sqlite.read_bytes())
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True))
    return path


def run(config: Path, *words: str) -> str:
    result = CliRunner().invoke(cli, [*words, "--config", str(config)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_trial_from_its_beginning_to_its_end(config: Path) -> None:
    assert run(config, "canary", "status").strip() == "one pipeline: no canary was ever set"
    assert run(config, "canary", "set", "wan-next", "100").strip() == "wan-next: canary with 100 %"

    async def fail(store: JobStore) -> None:
        for number in range(2):
            await store.create(PARAMS, "wan")
            job = await store.claim("me", 60)
            assert job is not None and job.pipeline == "wan-next"
            if number == 0:
                await store.fail(job.id, 1, "internal_error", "x")
                assert await store.claim("me", 60) is not None

    on_store(f"sqlite:///{config.parent / 'jobs.db'}", fail)
    stable, canary = json.loads(run(config, "canary", "status", "--json"))
    assert (stable["name"], stable["percent"], stable["unfinished"]) == ("wan", 0, 1)
    assert (canary["name"], canary["state"], canary["unfinished"]) == ("wan-next", "canary", 1)
    assert (canary["ended"], canary["failed"], canary["slowdown"]) == (1, 1, None)
    heading, first, second = run(config, "canary", "status").splitlines()
    assert " ".join(heading.split()) == "NAME STATE SHARE SINCE UNFINISHED ENDED FAILED SLOWDOWN WHAT"
    assert first.split()[:2] == ["wan", "stable"] and second.split()[:4] == ["wan-next", "canary", "100", "%"]
    said = run(config, "canary", "abort", "wan-next", "--reason", "Colours are off.")
    assert said.strip() == "wan-next: aborted; 1 jobs go to the stable pipeline"
    assert run(config, "canary", "status").splitlines()[2].endswith("Colours are off.")
    assert run(config, "canary", "promote", "wan-next").strip() == "wan-next: stable"
    states = [(row["name"], row["state"]) for row in json.loads(run(config, "canary", "status", "--json"))]
    assert states == [("wan-next", "stable"), ("wan", "retired")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("set", "wan", "5"), "NAME has value 'wan', the stable pipeline's, expected another one's"),
        (("abort", "x"), "NAME has value 'x', expected a canary, and none is on trial"),
    ],
)
def test_what_cannot_be_is_one_line(config: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ServeAppError) as raised:
        run(config, "canary", *words)
    assert str(raised.value) == message


def test_generations_are_listed_and_switched(config: Path) -> None:
    async def come(store: JobStore) -> None:
        for name in ("old", "new"):
            await store.report_generation(name, True)

    on_store(f"sqlite:///{config.parent / 'jobs.db'}", come)
    heading, first, second = run(config, "generations", "list").splitlines()
    assert heading.split() == ["NAME", "STATE", "SINCE", "LAST", "SEEN"]
    assert first.split()[:2] == ["new", "current"] and second.split()[:2] == ["old", "retired"]
    assert run(config, "generations", "switch", "old").strip() == "old: current; new is retired"
    assert run(config, "generations", "switch", "old").strip() == "old: current"
