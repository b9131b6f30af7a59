"""The code in the pages works: files are configurations, commands exist with these options, requests are answered."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import openai
import pytest
import typer
import yaml

from cluster.dev.commands import cli as cluster_cli
from docs.generate.cli import commands
from serve_app.cli import cli as wan_serve
from serve_app.config import load_file, validate
from serve_app.simulate.fleet import load_fleet
from tests.docs.pages import ROOT, Block, blocks, shell_lines
from tests.gateway import conftest as gateway

# The in-process gateway of the tests beside it, with what it stands on.
auth, storage_options, server, client = gateway.auth, gateway.storage_options, gateway.server, gateway.client
empty_sqlite = gateway.empty_sqlite

WAN_SERVE = {path[1:]: command for path, command in commands()}
ROOT_OPTIONS = typer.main.get_command(wan_serve).params
CLUSTER = {path[1:]: command for path, command in commands(typer.main.get_command(cluster_cli), ("cluster.dev",))}
ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


def bash() -> list[tuple[Block, str]]:
    """Return every command of the pages with where it stands."""
    return [(block, line) for block in blocks("bash") for line in shell_lines(block)]


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_configuration(block: Block, tmp_path: Path) -> None:
    content = yaml.safe_load(block.text)
    if "applications" in content:
        path = tmp_path / "my.yaml"
        path.write_text(block.text)
        load_file(path)
    elif block.text.startswith("# fleet.yaml"):
        path = tmp_path / "fleet.yaml"
        path.write_text(block.text)
        load_fleet(path)
    else:
        # A fragment shows what it is about; what it needs besides is said in words.
        validate({"model": {"sharded": "/models/a14b-1"}, **content} if "offload" in block.text else content)


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize(("block", "line"), bash(), ids=lambda value: str(value)[:60])
def test_command_exists(block: Block, line: str) -> None:
    for words in _commands(line):
        _check(words)
    for path in re.findall(r"(?<![\w/])(?:configs|cluster|benchmarks)/[\w./-]+\w", line):
        assert (ROOT / path).exists(), f"{block}: {path}"


def _commands(line: str) -> list[list[str]]:
    """Split a line into its commands, without variables that are set for them."""
    found: list[list[str]] = [[]]
    for word in shlex.split(line.replace("&&", " && "), comments=True):
        if word in ("&&", ";", "|"):
            found.append([])
        else:
            found[-1].append(word)
    for words in found:
        while words and ASSIGNMENT.fullmatch(words[0]):
            del words[0]
    return [words for words in found if words]


def _check(words: list[str]) -> None:
    """Check what can be checked of a command without running it."""
    name, *arguments = words
    if name == "eval":
        name, *arguments = shlex.split(arguments[0].removeprefix("$(").removesuffix(")"))
    name = name.removeprefix(".venv/bin/")
    if name == "wan-serve":
        _parse(WAN_SERVE, arguments)
    elif name.startswith("python") and arguments[:1] == ["-m"] and arguments[1] != "venv":
        assert importlib.util.find_spec(arguments[1]), arguments[1]
        if arguments[1] == "cluster.dev":
            _parse(CLUSTER, arguments[2:])
    elif name == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in arguments:
            assert "=" in target or re.search(rf"^{target}:", makefile, re.MULTILINE), target
    elif name == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
            assert set(extra.split(",")) <= set(extras)


def _parse(known: dict[tuple[str, ...], Any], arguments: list[str]) -> None:
    """Have typer's own parser read a command line; `--help` and options of `wan-serve` itself only have to exist."""
    if arguments[-1] == "--help":
        assert tuple(arguments[:-1]) in known, arguments
        return
    if arguments[0].startswith("--"):
        assert arguments in [[option] for one in ROOT_OPTIONS for option in one.opts]
        return
    path = next(path for path in known if tuple(arguments[: len(path)]) == path)
    known[path].make_context(" ".join(path), arguments[len(path) :])


REQUESTS = [(block, line) for block, line in bash() if line.startswith("curl ") and "zh-CN" not in block.page]


@pytest.mark.parametrize("page", sorted({block.page for block, _ in REQUESTS}))
async def test_requests_are_answered(page: str, server: gateway.Server) -> None:
    for block, line in REQUESTS:
        if block.page != page:
            continue
        method, path, headers, body = _curl(line)
        if "video_…" in path:
            path = path.replace("video_…", (await server.completed())["id"])
        answer = await server.http.request(method, path, headers=headers, content=body)
        if "we_…" in path:  # nothing is sent from a test: that the endpoint is missing shows that all else is right
            missing = answer.json()["error"]["param"] == "webhook_endpoint_id"
            assert answer.status_code == 404 and missing, f"{block}: {line}: {answer.text}"
        else:
            assert answer.status_code in (200, 302), f"{block}: {line}: {answer.text}"


def _curl(line: str) -> tuple[str, str, dict[str, str], str | None]:
    """Return the method, path, headers and body of a request."""
    words = iter(shlex.split(line)[1:])
    method, path, headers, body = "", "", {}, None
    for word in words:
        if word == "-X":
            method = next(words)
        elif word == "-H":
            name, _, value = next(words).partition(": ")
            headers[name] = value.replace("…", "0")
        elif word == "-d":
            body = next(words)
        elif word == "-o":
            next(words)
        elif not word.startswith("-"):
            path = "/" + word.partition("/")[2]
    return method or ("GET" if body is None else "POST"), path, headers, body


@pytest.mark.parametrize(
    "block", [one for one in blocks("python") if "from openai import" in one.text and "zh-CN" not in one.page], ids=str
)
async def test_python_of_the_sdk(
    block: Block, client: openai.AsyncOpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = block.text.replace("http://127.0.0.1:8000/v1", str(client.base_url))
    await asyncio.to_thread(exec, compile(text, str(block), "exec"), {})
    assert (tmp_path / "star.mp4").stat().st_size
