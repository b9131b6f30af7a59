"""The bundled model's vocabulary, and the warning for a prompt outside of it. Knows nothing of tokens or torch.

The model was trained only on captions made of `words.py`: it draws one or two of four shapes whatever the prompt says.
"""

from __future__ import annotations

import re
import unicodedata

from serve_app.tiny.words import SHAPE_WORDS

NOTE = (
    "This small test model draws circles, squares, triangles and stars that move, one or two at a time, and nothing "
    "else."
)
"""A sentence about the model, shown wherever a prompt is typed."""

WARNING = (
    "The prompt names none of the shapes that this small test model knows (circle, square, triangle, star; 圆形, "
    "正方形, 三角形, 星形), so the video shows some shape and not what was asked for."
)

_WORD = re.compile(r"[a-z]+")
_ENGLISH = frozenset(word for words in SHAPE_WORDS["en"].values() for word in words if " " not in word)
_CHINESE = tuple(word for words in SHAPE_WORDS["zh"].values() for word in words)
# Chinese has no spaces: these words hold the name of a shape but mean something else, such as a shape that the model
# does not know.
_OTHERS = re.compile("[椭半]圆形?|长方形|圆[桌满明周珠润滑舞]|[团汤桂月]圆|三角[洲恋裤铁]|方块字")


def knows(prompt: str) -> bool:
    """Return True if a prompt names a shape that the bundled model draws, in English or Chinese.

    Full-width letters, capitals and plurals are read as the words that they are.
    """
    text = unicodedata.normalize("NFKC", prompt).lower()
    english = _WORD.findall(text)
    if any(word in _ENGLISH or _singular(word) in _ENGLISH for word in english):
        return True
    text = _OTHERS.sub(" ", text)
    return any(word in text for word in _CHINESE)


def warnings(prompt: str) -> list[str]:
    """Return warnings for a prompt: one if it names no shape that the model draws, else none."""
    return [] if knows(prompt) else [WARNING]


def _singular(word: str) -> str:
    return word.removesuffix("es") if word.endswith("xes") else word.removesuffix("s")
