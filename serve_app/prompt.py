"""Prompts, cleaned as the model was trained to read them."""

from __future__ import annotations

import html
import re
import unicodedata

import ftfy

# Characters without a picture of their own. By Unicode category: control and format characters, spaces, and marks that
# need a letter to stand on. Besides, letters and symbols that are blank: Hangul fillers, the empty Braille pattern.
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Mc", "Me")
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")


def clean_prompt(text: str) -> str:
    """Return a prompt as the model was trained to read it: mended mojibake, no HTML entities, single spaces.

    The result is that of `prompt_clean` in diffusers' pipeline_wan.py, which silently skips ftfy if that is missing.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def says_something(text: str) -> bool:
    """Return whether a cleaned prompt has any visible character."""
    return any(sign not in _BLANK and unicodedata.category(sign) not in _UNSEEN for sign in clean_prompt(text))
