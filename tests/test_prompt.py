from __future__ import annotations

import pytest

from serve_app.config import Config
from serve_app.errors import InvalidRequest
from serve_app.prompt import says_something
from serve_app.request import VideoRequest, resolve

NOTHING = [
    *("", " \n\t", "&nbsp;", "&amp;nbsp; &#160;", "&#x200b;", "&zwj;&shy;", "\u00a0\u3000\u2003", "\u200b", "\ufeff"),
    *("\u00ad\u00ad", "\x1b[31m", "\x01\x02\x7f", "\u0301\u0308", "\u200e\u202e", "\u2060\u180e", "\ufe0f"),
    *("\u3164", "\u115f\u1160", "\uffa0", "\u2800", "\U000e0020", "\u034f", "\u200d\u20e3"),
]


@pytest.mark.parametrize("prompt", NOTHING)
def test_nothing_is_left_for_the_model(prompt: str) -> None:
    assert not says_something(prompt)
    with pytest.raises(InvalidRequest, match=r"'prompt' is empty.*, expected a description") as error:
        resolve(VideoRequest(prompt=prompt), Config())
    assert error.value.param == "prompt"


@pytest.mark.parametrize(
    "prompt",
    [
        "a",
        "7",
        "!",
        "☀️",
        "👩‍👩‍👧",
        "\U0001fae8",
        "星",
        "한",
        "é",
        "e\u0301",
        "&lt;",
        "&nbsp;x",
        "\u200bx",
        "ไก่",
        "\ufffd",
    ],
)
def test_something_is_left(prompt: str) -> None:
    assert says_something(prompt)
    assert resolve(VideoRequest(prompt=prompt), Config()).prompt == prompt


def test_length_is_in_characters() -> None:
    most = Config().limits.prompt_chars
    assert resolve(VideoRequest(prompt="星" * most), Config()).prompt
    with pytest.raises(InvalidRequest, match=f"'prompt' has {most + 1} characters"):
        resolve(VideoRequest(prompt="星" * (most + 1)), Config())
