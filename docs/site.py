"""Build one static site of all pages, in site/.

    python -m docs.site

Pages link to one another as files of the repository, so the site mirrors it: every page that git knows and every file
that one links to are copied to build/pages, from where Zensical builds them by mkdocs.yml. A link that leads nowhere is
an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "pages"

_LINK = re.compile(r"\]\(([^)\s#]+)")


def collect() -> None:
    """Copy the pages and what they link to."""
    shutil.rmtree(PAGES, ignore_errors=True)
    known = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    for page in map(Path, known.stdout.split()):
        _copy(page)
        for target in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            linked = (ROOT / page.parent / target).resolve()
            if linked.is_file() and linked.is_relative_to(ROOT) and linked.suffix != ".md":
                _copy(linked.relative_to(ROOT))


def _copy(path: Path) -> None:
    target = PAGES / path
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / path, target)


if __name__ == "__main__":
    collect()
    zensical = Path(sys.executable).with_name("zensical")
    sys.exit(subprocess.run([zensical, "build", "--clean", "--strict"], cwd=ROOT, check=False).returncode)
