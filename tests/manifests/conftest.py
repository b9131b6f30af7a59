"""Configurations for Kubernetes, as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.launch import shipped

Content = dict[str, Any]
Change = Callable[[Content, Content], object]


def changed(folder: Path, change: Change = lambda content, args: None, name: str = "a14b-hosts") -> Path:
    """Write a changed copy of a shipped file into a folder. The change gets the file and its `args`."""
    content = yaml.safe_load((shipped.folder() / f"{name}.yaml").read_text())
    args = content["applications"][0]["args"]
    change(content, args)
    for application in content["applications"]:
        application["args"] = args
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a changed copy of a shipped file."""
    return lambda *arguments: changed(tmp_path, *arguments)


def for_pods(content: Content, args: Content) -> None:
    """Change a file of one host so that it can run in Pods."""
    args["store"] = {"url": "postgresql://wan@db.internal/wan"}
    args["storage"] = {"url": "s3://videos/wan"}
    args["auth"] = {"mode": "keys"}
