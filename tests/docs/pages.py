"""The Markdown of the repository, and the code in it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def pages() -> tuple[str, ...]:
    """Return the paths of all Markdown files that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return tuple(sorted(page for page in found if (ROOT / page).exists()))


def read(page: str) -> str:
    """Return the text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(*languages: str, page: str | None = None) -> list[Block]:
    """Return the blocks of code in these languages, of one page or of those for users and contributors."""
    found = []
    for name in [page] if page else [one for one in pages() if not one.startswith(("benchmarks/", "serve_app/"))]:
        text = read(name)
        for match in _FENCE.finditer(text):
            if match[1] in languages:
                found.append(Block(name, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def shell_lines(block: Block) -> list[str]:
    """Return the commands of a block, continued lines joined, without comments and empty lines.

    A quoted argument may go on over lines.
    """
    lines: list[str] = []
    pending = ""
    for line in block.text.splitlines():
        pending = f"{pending}\n{line}" if pending else line
        if pending.endswith("\\") or pending.count("'") % 2:
            continue
        command = pending.replace("\\\n", " ").strip()
        pending = ""
        if command and not command.startswith("#"):
            lines.append(command)
    return lines


def anchors_of(text: str) -> set[str]:
    """Return the names by which links reach the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
