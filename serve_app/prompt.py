"""A prompt as the model reads it."""

from __future__ import annotations

import html
import re
import unicodedata

import ftfy

# What has no picture of its own, by Unicode's category: control and format characters, spaces, and marks that need a
# letter to stand on; and letters and symbols that are blank all the same (Hangul fillers, the empty Braille pattern).
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Mc", "Me")
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")


def clean_prompt(text: str) -> str:
    """Return `text` as the model was trained to read it: mended mojibake, no HTML entities, single spaces.

    The same as `prompt_clean` in diffusers' pipeline_wan.py, which skips ftfy silently where it is not installed.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def says_something(text: str) -> bool:
    """Return whether anything that can be seen is left of a prompt once it is cleaned."""
    return any(sign not in _BLANK and unicodedata.category(sign) not in _UNSEEN for sign in clean_prompt(text))
