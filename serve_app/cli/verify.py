"""`wan-serve verify`: show what a file says about how it was made."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from serve_app.finish.verify import Verification


def verify(
    file: Annotated[Path, typer.Argument(help="A video (mp4, webm) or picture (webp, gif, png, jpg).")],
    trust: Annotated[
        Path | None, typer.Option(help="PEM file with certificates; signatures that lead to one are trusted.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show whether a file says that it is AI-made, by what, and whether its signature holds.

    The status is 0 if it says so and no signature is broken, 1 otherwise.
    """
    from serve_app.finish.verify import verify as read

    for name, path in (("FILE", file), ("--trust", trust)):
        if path is not None and not path.is_file():
            raise ConfigError(f"{name} has value '{path}', expected a file")
    found = read(file, trust)
    ok = found.ai_made and not found.changed
    if as_json:
        print(json.dumps({"ai_made": found.ai_made, **asdict(found)}, ensure_ascii=False, indent=2))
    else:
        for name, text in _rows(found):
            print(f"{name:<12}{text}")
    raise typer.Exit(0 if ok else 1)


def _rows(found: Verification) -> list[tuple[str, str]]:
    """Return the lines of the report, each with its name."""
    where = {
        "description": found.description.startswith("AI-generated"),
        "XMP": "Iptc4xmpExt:DigitalSourceType" in found.xmp,
        "C2PA manifest": bool(found.c2pa and found.c2pa["source_type"]),
    }
    places = [place for place, says in where.items() if says]
    rows = [("AI-made", f"yes, by its {', '.join(places)}" if found.ai_made else "the file does not say so")]
    if maker := found.xmp.get("Iptc4xmpExt:AISystemUsed") or found.description:
        rows.append(("made by", maker))
    rows.append(("C2PA", _signature(found)))
    rows += [("C2PA", f"  {problem}") for problem in (found.c2pa or {}).get("problems", [])]
    if found.video:
        rows.append(("video", ", ".join(f"{name} {text}" for name, text in found.video.items())))
    rows += [("parameter", f"{name}: {value}") for name, value in found.parameters.items()]
    return rows


def _signature(found: Verification) -> str:
    if found.c2pa is None:
        return found.c2pa_note or "no manifest"
    meaning = {
        "trusted": "unchanged since it was signed, by a trusted certificate",
        "valid": "unchanged since it was signed; --trust checks by whom",
    }.get(found.c2pa["state"], "changed since it was signed, or signed wrongly")
    return f"{found.c2pa['state']}: {meaning}. Signer: {found.c2pa['signer']} ({found.c2pa['issuer']})"
