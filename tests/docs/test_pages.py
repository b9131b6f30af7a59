"""Pages can be found, are short where they should be, and are in step with their translations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, anchors_of, blocks, pages, read, shell_lines

TRANSLATED = [("README.md", "README.zh-CN.md"), ("docs/quickstart.md", "docs/quickstart.zh-CN.md")]

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def test_readme_is_one_page() -> None:
    assert len(read("README.md").splitlines()) <= 130
    assert len(read("README.zh-CN.md").splitlines()) <= 130


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    for target in _LINK.findall(_CODE.sub("", read(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors_of(read(str(found.resolve().relative_to(ROOT)))), f"{page}: {target}"


@pytest.mark.parametrize(("page", "translation"), TRANSLATED)
def test_translation_is_in_step(page: str, translation: str) -> None:
    """Same commands, same headings, same links and same numbers in tables."""
    ours, theirs = (
        [line for one in blocks("bash", "python", page=name) for line in shell_lines(one)]
        for name in (page, translation)
    )
    assert ours == theirs
    levels = [
        [
            len(title)
            for title in re.findall(r"^(#+) ", re.sub(r"^```.*?^```$", "", read(name), flags=re.M | re.S), re.M)
        ]
        for name in (page, translation)
    ]
    assert levels[0] == levels[1]
    assert links(page) - {Path(translation).name} == links(translation) - {Path(page).name}
    rows = [
        [re.findall(r"\| ([\d.,]+) (?=\|)", line) for line in read(name).splitlines() if line.startswith("|")]
        for name in (page, translation)
    ]
    assert rows[0] == rows[1]


def links(page: str) -> set[str]:
    """Return what a page links to."""
    return set(_LINK.findall(_CODE.sub("", read(page))))


def test_every_page_is_linked() -> None:
    """A page that no other one links to is not found by anybody."""
    reached = {
        str(((ROOT / page).parent / target.partition("#")[0]).resolve().relative_to(ROOT))
        for page in pages()
        for target in links(page)
        if not re.match(r"[a-z]+:", target) and target.partition("#")[0]
    }
    lost = [page for page in pages() if page.startswith("docs/") and page not in reached and page != "docs/index.md"]
    assert not lost
