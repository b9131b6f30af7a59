"""Captions of scenes in English and Chinese, the held-out split, and the request defaults that suit the tiny model.

Puts the words of words.py together; scenes come as plain names. "train" and "test" use different sentence patterns,
and objects whose (colour, shape, motion) is held out never appear in training, so the benchmark asks for both unseen
combinations and unseen phrasings. What the "test" split draws is fixed for ever (tests/tiny/test_text.py), so that
figures of different weights compare.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from serve_app.tiny.recipe.shapes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES
from serve_app.tiny.words import (
    ASIDES,
    CHANGE,
    COLOUR_WORDS,
    FAULTS,
    GO,
    GROUND_PHRASE,
    GROUND_WORDS,
    MOVE_ZH,
    ONE,
    PAIR_ZH,
    PATTERN,
    SHAPE_WORDS,
    WAY,
)

LANGUAGES = ("en", "zh")
ASIDE_SHARE = 0.3  # of the training captions hold words that tell nothing
NEGATIVE = "blurry, faded, low contrast, low quality"
# The one place for the request defaults recommended with this checkpoint; configs/tiny.yaml repeats them.
DEFAULTS: dict[str, Any] = {
    "height": 128,
    "width": 128,
    "num_frames": 33,
    "fps": 16,
    "num_inference_steps": 20,
    "guidance_scale": 4.0,
    "guidance_scale_2": 4.0,
    "flow_shift": 5.0,
    "negative_prompt": NEGATIVE,
}


class Thing(NamedTuple):
    """One object of a scene, by the names in COLOURS, SHAPES and MOTIONS."""

    colour: str
    shape: str
    motion: str


def held_out() -> torch.Tensor:
    """Return the triples that are kept for the benchmark, as bool [colours, shapes, motions].

    It is one in eight, chosen by a hash, so that the split never changes.
    """
    out = torch.zeros(len(COLOURS), len(SHAPES), len(MOTIONS), dtype=torch.bool)
    for i, c in enumerate(COLOURS):
        for j, s in enumerate(SHAPES):
            for k, m in enumerate(MOTIONS):
                out[i, j, k] = hashlib.sha256(f"{c} {s} {m}".encode()).digest()[0] < 32
    return out


def _pick(rng: random.Random, table: Mapping[str, tuple[str, ...]], key: str) -> str:
    return rng.choice(table.get(key, (key,)))


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _english(things: list[Thing], split: str, rng: random.Random) -> tuple[str, str, str, bool]:
    """Return the object phrase, the -ing form, the finite form, and True if the phrase already tells the motion."""

    def move(motion: str) -> tuple[str, str, str]:
        if motion in WAY:
            way = rng.choice(WAY[motion])
            base, third, ing = (f"{verb} {way}" for verb in rng.choice(GO))
            return base, third, ing
        return rng.choice(CHANGE[motion])

    def noun(t: Thing) -> str:
        return f"{_pick(rng, COLOUR_WORDS['en'], t.colour)} {_pick(rng, SHAPE_WORDS['en'], t.shape)}"

    base, third, ing = move(things[0].motion)
    if len(things) == 1:
        word = noun(things[0])
        return rng.choice(ONE["en"][split]).format(a=_article(word), n=word), ing, third, False
    if things[0] == things[1]:
        word = noun(things[0]) + "s"
        return word.replace("boxs", "boxes").join((rng.choice(("two ", "two ", "a pair of ")), "")), ing, base, False
    nouns = [rng.choice((_article, "one {}".format))(noun(t)) for t in things]
    if things[0].motion == things[1].motion:
        tail = rng.choice(("", "", " both", " together"))
        return f"{nouns[0]} and {nouns[1]}{tail}", ing, base, False
    other = move(things[1].motion)
    join = rng.choice((" and ", " and ", ", ", " while "))
    told = rng.choice(
        ((f"{nouns[0]} {ing}{join}{nouns[1]} {other[2]}"), (f"{nouns[0]} that {third} and {nouns[1]} that {other[1]}"))
    )
    return told, "", "", True


def _chinese(things: list[Thing], split: str, rng: random.Random) -> tuple[str, str, bool]:
    def noun(t: Thing) -> str:
        colour = _pick(rng, COLOUR_WORDS["zh"], t.colour)
        return (
            colour + (rng.choice(("的", "")) if colour.endswith("色") else "") + _pick(rng, SHAPE_WORDS["zh"], t.shape)
        )

    move = rng.choice(MOVE_ZH[things[0].motion])
    if len(things) == 1:
        return rng.choice(ONE["zh"][split]) + noun(things[0]), move, False
    if things[0] == things[1]:
        return rng.choice(("两个", "两个", "一对")) + noun(things[0]), move, False
    nouns = [rng.choice(("一个", "一个", "")) + noun(t) for t in things]
    if things[0].motion == things[1].motion:
        return nouns[0] + rng.choice(("和", "与", "和")) + nouns[1] + rng.choice(("", "", "一起", "都")), move, False
    join = rng.choice(("，", "，", "并且", "，同时"))
    return (
        f"{nouns[0]}{move}{join}{nouns[1]}{rng.choice(MOVE_ZH[things[1].motion])}",
        "",
        True,
    )


def caption(things: list[Thing], ground: str | None, language: str, split: str, rng: random.Random) -> str:
    """Return one caption of a scene.

    Args:
        things: one or two objects, in the order in which they are told.
        ground: the name of the background; None leaves it open.
        language: `en` or `zh`.
        split: `train` or `test`.
        rng: draws the words and the sentence pattern.
    """
    comma = ", " if language == "en" else "，"
    parts = []
    if ground is not None:
        phrase = rng.choice(GROUND_PHRASE[language][split])
        parts = [phrase.format(_pick(rng, GROUND_WORDS[language], ground))]
    before = after = ""
    if split == "train" and rng.random() < ASIDE_SHARE:
        aside, place = rng.choice(ASIDES[language]), rng.choice(("before", "after", "beside"))
        if place == "beside":
            parts.insert(rng.randint(0, len(parts)), aside)
        else:
            # Spoken Chinese often has no comma here, and just there "下" stands before "一个".
            loose = rng.choice((comma, " " if language == "en" else ""))
            before, after = (aside + loose, "") if place == "before" else ("", comma + aside)
    where = comma.join(parts)
    if language == "en":
        pattern = rng.choice(PATTERN["en"][split])
        phrase, ing, finite, told = _english(things, split, rng)
        if told:
            pattern = rng.choice([p for p in PATTERN["en"][split] if "{i}" in p])
        text = pattern.format(o=phrase, i=ing, f=finite, b=where)
        text = " ".join(text.replace(" ,", ",").split()).strip(" ,:")
        text = text.replace(", ,", ",").replace(",,", ",")
    else:
        pattern = rng.choice(PATTERN["zh"][split])
        phrase, move, told = _chinese(things, split, rng)
        if told:
            pattern = rng.choice(PAIR_ZH[split])
        text = pattern.format(o=phrase, m=move, b=where)
        while "，，" in text:
            text = text.replace("，，", "，")
        text = text.strip("，：").replace("：，", "：")
    return before + text + after


def poor_caption(text: str, language: str, rng: random.Random) -> str:
    """Return a caption of a degraded clip: two to four words for its faults, in half of the cases after `text`."""
    faults = (", " if language == "en" else "，").join(rng.sample(FAULTS[language], rng.randint(2, 4)))
    return faults if rng.random() < 0.5 else f"{text}, {faults}"


def names(colour: int, shape: int, motion: int) -> Thing:
    """Return the object with these indices, by name."""
    return Thing(list(COLOURS)[colour], SHAPES[shape], MOTIONS[motion])


class Prompt(NamedTuple):
    """A held-out prompt, with the objects and the background that it asks for."""

    text: str
    things: list[Thing]
    ground: str


def held_out_prompts(n: int, language: str, seed: int = 1234, two: float = 0.35) -> list[Prompt]:
    """Return n prompts of held-out objects in held-out phrasings.

    A share `two` of them asks for two objects, which are alike in half of these prompts.
    """
    rng = random.Random(f"{seed} {language}")
    triples = [names(*t) for t in held_out().nonzero().tolist()]
    prompts = []
    for _ in range(n):
        things = [rng.choice(triples)]
        if rng.random() < two:
            things.append(things[0] if rng.random() < 0.5 else rng.choice(triples))
        ground = rng.choice(list(BACKGROUNDS))
        prompts.append(Prompt(caption(things, ground, language, "test", rng), things, ground))
    return prompts
