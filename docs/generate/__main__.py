"""Write the reference pages from the code: options, command line, API, errors and metrics.

    python -m docs.generate [--check]

With `--check` nothing is written, and the exit status is 1 if a page is stale. What the code does not say of itself is
in `docs/reference/words.yaml`: a sentence for each error code, and for options and fields without a docstring. It is an
error here if that file lacks a code or an option, or has one that is gone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from docs.generate.api import api_page
from docs.generate.cli import cli_page
from docs.generate.errors import errors_page
from docs.generate.markdown import Stale
from docs.generate.metrics import metrics_page
from docs.generate.options import options_page

REFERENCE = Path(__file__).resolve().parents[1] / "reference"


def pages() -> dict[str, str]:
    """Return the text of each page by its file name.

    Raises:
        Stale: `words.yaml` and the code do not name the same things.
    """
    words = yaml.safe_load((REFERENCE / "words.yaml").read_text(encoding="utf-8"))
    return {
        "options.md": options_page(words["options"]),
        "cli.md": cli_page(),
        "api.md": api_page(words),
        "errors.md": errors_page(words["api_errors"], words["job_errors"]),
        "metrics.md": metrics_page(),
    }


def stale() -> list[str]:
    """Return the names of the pages that are not what the code says."""
    return [
        name
        for name, text in pages().items()
        if not (REFERENCE / name).exists() or (REFERENCE / name).read_text(encoding="utf-8") != text
    ]


def main() -> None:
    """Write the pages, or say which are stale."""
    try:
        names = stale()
        if "--check" in sys.argv:
            sys.exit(f"stale, `make docs-reference` writes them: {', '.join(names)}" if names else 0)
        for name, text in pages().items():
            (REFERENCE / name).write_text(text, encoding="utf-8")
        print(f"changed: {', '.join(names) or 'none'}")
    except Stale as error:
        sys.exit(f"docs.generate: {error}")


if __name__ == "__main__":
    main()
