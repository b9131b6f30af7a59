"""Write the dashboards and the alert rules that are checked in.

    python -m cluster.observability [--check]

With `--check` nothing is written, and the exit status is 1 if a file is stale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from cluster.observability.alerts import rules
from cluster.observability.dashboards import DASHBOARDS

FOLDER = Path(__file__).resolve().parent
_NOTE = "# Written by `python -m cluster.observability`. Do not edit: change alerts.py.\n"


def files() -> dict[Path, str]:
    """Return the text of each file."""
    texts = {
        FOLDER / "dashboards" / f"{one.uid}.json": json.dumps(one.json(), indent=2, ensure_ascii=False) + "\n"
        for one in DASHBOARDS
    }
    texts[FOLDER / "rules.yml"] = _NOTE + yaml.safe_dump(rules(), sort_keys=False, width=1000, allow_unicode=True)
    return texts


def stale() -> list[str]:
    """Return the names of files that are not what the code says, and of dashboards that it does not have."""
    texts = files()
    names = [path.name for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    return names + [path.name for path in (FOLDER / "dashboards").glob("*.json") if path not in texts]


def main() -> None:
    """Write the files, or say which are stale."""
    names = stale()
    if "--check" in sys.argv:
        sys.exit(f"stale, `python -m cluster.observability` writes them: {', '.join(names)}" if names else 0)
    for path, text in files().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"changed: {', '.join(names) or 'none'}")


if __name__ == "__main__":
    main()
