"""The generated pages are what the code says."""

from __future__ import annotations

import re

from docs.generate.__main__ import stale
from tests.docs.pages import ROOT, pages, read


def test_not_stale() -> None:
    assert not stale(), "`make docs-reference` writes them"


def test_every_environment_variable_is_told() -> None:
    """Whoever deploys finds each variable that the code looks at."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "serve_app").rglob("*.py"))
    told = "".join(read(page) for page in pages())
    names = set(re.findall(r"\bWAN_SERVE_[A-Z_]+\b", source))
    assert len(names) > 3
    assert not {name for name in names if name not in told}


def test_every_code_of_an_error_is_explained_once() -> None:
    codes = re.findall(r"^\| \d{3} \| `(\w+)`", read("docs/reference/errors.md"), re.MULTILINE)
    assert len(codes) == len(set(codes)) > 20
