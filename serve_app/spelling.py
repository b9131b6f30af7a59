"""Suggestions for unknown names of fields: other servers' words for the same thing, and typing errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from serve_app.parameters import EVERY

_OURS = {synonym: name for name, one in EVERY.items() for synonym in one.synonyms}


def unknown_field(name: str, known: Sequence[str], inside: str = "") -> str:
    """Return the error for an unknown field, with the field that is probably meant, or all fields.

    Args:
        name: the field.
        known: the fields that there are.
        inside: the object that it stands in and a point; empty for fields of the request itself.
    """
    meant = suggestion(name, known)
    if meant is not None:
        return f"Unknown field '{inside}{name}', did you mean '{inside}{meant}'?"
    return f"Unknown field '{inside}{name}', expected one of {', '.join(known)}."


def suggestion(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is most likely meant; None if none is similar."""
    # `numFrames`, `num-frames` and `NUM_FRAMES` are one name.
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").replace(" ", "_").lower()
    if plain in known:
        return plain
    if (meant := _OURS.get(plain)) in known:
        return meant
    close = get_close_matches(plain, [*known, *_OURS], 1, 0.75)
    found = _OURS.get(close[0], close[0]) if close else None
    return found if found in known else None
