"""What runs by itself names things that exist: the pre-commit hooks, the workflow, `.ci/run`, the forms of issues."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import ROOT

HOOKS = ROOT / ".pre-commit-config.yaml"
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def check_commands(script: str) -> None:
    """Check that a shell script's lines name targets of the Makefile, and executable files of the repository."""
    for line in script.splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words and words[0] == "make":
                assert words[1:] and set(words[1:]) <= TARGETS, line
            elif words and "/" in words[0]:
                assert os.access(ROOT / words[0], os.X_OK), line


@pytest.mark.parametrize(
    ("script", "wrong"),
    [("make test", False), ("make tests", True), (".ci/run", False), (".ci/walk", True), ("cd x && make no", True)],
)
def test_commands_are_looked_up(script: str, wrong: bool) -> None:
    if wrong:
        with pytest.raises(AssertionError):
            check_commands(script)
    else:
        check_commands(script)


@pytest.mark.parametrize(
    "hook", [hook for repo in load(HOOKS)["repos"] for hook in repo["hooks"]], ids=lambda hook: hook["id"]
)
def test_a_hook_runs_a_program_of_the_environment(hook: dict[str, Any]) -> None:
    assert hook["language"] == "system" and hook["name"]
    program, *arguments = shlex.split(hook["entry"])
    folder, _, name = program.rpartition("/")
    assert folder == ".venv/bin" and (Path(sys.executable).parent / name).exists(), program
    if arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1]), arguments[1]
    if "files" in hook:
        files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "serve_app").rglob("*.py")]
        assert any(re.search(hook["files"], path) for path in files), "its pattern fits no file"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_is_there(path: Path) -> None:
    workflow = load(path)
    assert workflow["name"] and workflow[True], "`on` is the boolean of YAML 1.1"
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            check_commands(step.get("run", ""))
            options = step.get("with", {})
            if "python-version" in options:
                assert int(options["python-version"].removeprefix("3.")) >= int(oldest)
            if "cache-dependency-path" in options:
                assert (ROOT / options["cache-dependency-path"]).exists()
            for variable in step.get("env", {}):
                if variable.startswith("WAN_"):
                    assert any(variable in file.read_text() for file in (ROOT / "tests/support").glob("*.py")), variable


def test_the_workflow_and_a_clean_clone_run_the_same() -> None:
    script = (ROOT / ".ci/run").read_text()
    check_commands("\n".join(line for line in script.splitlines() if line.startswith("make ")))
    steps = [step.get("run") for path in WORKFLOWS for job in load(path)["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in steps
    assert {"make lint", "make test"} <= set(script.splitlines())


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_of_an_issue(path: Path) -> None:
    form = load(path)
    if path.stem == "config":
        assert form.keys() <= {"blank_issues_enabled", "contact_links"}
        return
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert ids and len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]
