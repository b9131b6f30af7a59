"""A search for a job in the logs of all Ray sessions of this host.

Knows Ray's folders, but needs neither the Ray package nor a running Ray.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

import psutil

# Ray Serve begins a line like this; our own lines are JSON objects with a `time`.
_SERVE_LINE = re.compile(r"[A-Z]+ (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3})")
_SESSION_OPTION = re.compile(r"--session[-_]dir=(.+)")


def session_folders(ray_folder: Path | None = None) -> list[Path]:
    """Return the folders of Ray's sessions on this host, running and ended ones.

    Args:
        ray_folder: holds the sessions (`ray start --temp-dir`). None means the default folder, and those of the Rays
            that run here.
    """
    found: set[Path] = set()
    roots = [ray_folder] if ray_folder is not None else [_default_folder()]
    for root in roots:
        if root.is_dir():
            found |= {path.resolve() for path in root.glob("session_*") if path.is_dir() and not path.is_symlink()}
    if ray_folder is None:
        found |= {path.resolve() for path in _running_sessions() if path.is_dir()}
    return sorted(found)


def job_lines(sessions: Iterable[Path], job_id: str, since: float = 0.0) -> list[str]:
    """Return the lines that name a job, by time.

    Args:
        sessions: folders as `session_folders` returns them.
        job_id: the id to look for.
        since: Unix time; files that were last written before it are left out.
    """
    lines: list[tuple[float, str]] = []
    for session in sessions:
        for path in sorted((session / "logs").rglob("*")):
            lines += _lines_of(path, job_id.encode(), since)
    return [line for _, line in sorted(lines, key=lambda entry: entry[0])]


def _lines_of(path: Path, needle: bytes, since: float) -> Iterator[tuple[float, str]]:
    """Yield the lines of a file that hold `needle`, each with its time, or that of the line before if it has none."""
    try:
        if not path.is_file() or path.is_symlink() or path.stat().st_mtime < since:
            return
        at = 0.0
        with path.open("rb") as file:
            for raw in file:
                if needle in raw:
                    line = raw.decode(errors="replace").rstrip()
                    at = _time_of(line) or at
                    yield at, line
    except (FileNotFoundError, PermissionError):  # Ray rotates and removes its logs, and another user's are not ours
        return


def _time_of(line: str) -> float | None:
    if match := _SERVE_LINE.match(line):
        return datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(match[2]) / 1000
    try:
        said = json.loads(line[line.index("{") :])["time"]
        return datetime.fromisoformat(said).timestamp()
    except (ValueError, KeyError, TypeError):
        return None


def _default_folder() -> Path:
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"


def _running_sessions() -> Iterator[Path]:
    for process in psutil.process_iter(["cmdline"]):
        for word in process.info["cmdline"] or ():
            if match := _SESSION_OPTION.fullmatch(word):
                yield Path(match[1])
