"""Captions of scenes in English and Chinese, the held-out split, and the request defaults that suit the tiny model.

Knows the words only; scenes come as plain names. "train" and "test" use different sentence patterns, and objects
whose (colour, shape, motion) is held out never appear in training, so the benchmark asks for both unseen
combinations and unseen phrasings.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from serve_app.tiny.shapes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

LANGUAGES = ("en", "zh")
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
    """One object of a scene, by name (keys of COLOURS, SHAPES, MOTIONS)."""

    colour: str
    shape: str
    motion: str


def held_out() -> torch.Tensor:
    """Bool [colours, shapes, motions]: the triples kept for the benchmark, one in eight, fixed for ever by a hash."""
    out = torch.zeros(len(COLOURS), len(SHAPES), len(MOTIONS), dtype=torch.bool)
    for i, c in enumerate(COLOURS):
        for j, s in enumerate(SHAPES):
            for k, m in enumerate(MOTIONS):
                out[i, j, k] = hashlib.sha256(f"{c} {s} {m}".encode()).digest()[0] < 32
    return out


_COLOUR = {
    "en": {"purple": ("purple", "purple", "violet"), "cyan": ("cyan", "cyan", "turquoise")},
    "zh": {
        "red": ("红色", "红色", "红"),
        "orange": ("橙色", "橙色", "橘色"),
        "yellow": ("黄色", "黄色", "黄"),
        "green": ("绿色", "绿色", "绿"),
        "cyan": ("青色", "青色", "青"),
        "blue": ("蓝色", "蓝色", "蓝"),
        "purple": ("紫色", "紫色", "紫"),
        "pink": ("粉色", "粉红色", "粉红"),
    },
}
_SHAPE = {
    "en": {
        "circle": ("circle", "circle", "disc", "ball"),
        "square": ("square", "square", "box"),
        "triangle": ("triangle",),
        "star": ("star", "star", "five-pointed star"),
    },
    "zh": {
        "circle": ("圆形", "圆形", "圆", "圆圈", "圆球"),
        "square": ("正方形", "正方形", "方块", "方形"),
        "triangle": ("三角形", "三角形", "三角"),
        "star": ("星形", "五角星", "星星"),
    },
}
_GROUND = {
    "en": {"gray": ("gray", "grey"), "navy": ("navy", "navy blue", "dark blue"), "beige": ("beige", "beige", "cream")},
    "zh": {
        "black": ("黑色",),
        "white": ("白色",),
        "gray": ("灰色",),
        "beige": ("米色", "米黄色"),
        "navy": ("深蓝色", "藏青色"),
    },
}
_GROUND_PHRASE = {
    "en": {
        "train": (
            "on a {} background",
            "on a {} background",
            "against a {} background",
            "over a {} background",
            "with a {} background",
            "{} background",
            "the background is {}",
            "on {}",
        ),
        "test": ("in front of a {} background", "on a plain {} background", "the whole background is {}"),
    },
    "zh": {
        "train": ("在{}背景上", "{}背景", "背景是{}", "在{}的背景上", "背景为{}", "{}的背景", "在{}背景前"),
        "test": ("在{}背景下", "整个背景是{}的", "以{}为背景"),
    },
}
# (base, third person, -ing) verbs times adverbs for the four directions.
_GO = (
    ("move", "moves", "moving"),
    ("move", "moves", "moving"),
    ("slide", "slides", "sliding"),
    ("go", "goes", "going"),
    ("drift", "drifts", "drifting"),
    ("travel", "travels", "travelling"),
    ("fly", "flies", "flying"),
)
_WAY = {
    "left": ("left", "to the left", "leftward", "leftwards", "towards the left", "from right to left"),
    "right": ("right", "to the right", "rightward", "rightwards", "towards the right", "from left to right"),
    "up": ("up", "upward", "upwards", "to the top", "towards the top", "from bottom to top"),
    "down": ("down", "downward", "downwards", "to the bottom", "towards the bottom", "from top to bottom"),
}
_CHANGE = {
    "bouncing": (
        ("bounce", "bounces", "bouncing"),
        ("bounce up and down", "bounces up and down", "bouncing up and down"),
        ("hop up and down", "hops up and down", "hopping up and down"),
    ),
    "growing": (
        ("grow", "grows", "growing"),
        ("get bigger", "gets bigger", "getting bigger"),
        ("grow larger", "grows larger", "growing larger"),
        ("become larger", "becomes larger", "becoming larger"),
        ("expand", "expands", "expanding"),
    ),
    "shrinking": (
        ("shrink", "shrinks", "shrinking"),
        ("get smaller", "gets smaller", "getting smaller"),
        ("become smaller", "becomes smaller", "becoming smaller"),
        ("contract", "contracts", "contracting"),
    ),
}
_MOVE_ZH = {
    "left": ("向左移动", "往左移动", "向左滑动", "往左走", "从右向左移动", "从右往左移动", "向左飞", "朝左移动"),
    "right": ("向右移动", "往右移动", "向右滑动", "往右走", "从左向右移动", "从左往右移动", "向右飞", "朝右移动"),
    "up": ("向上移动", "往上移动", "向上滑动", "往上走", "从下向上移动", "从下往上移动", "向上飞", "上升"),
    "down": ("向下移动", "往下移动", "向下滑动", "往下走", "从上向下移动", "从上往下移动", "下降", "下落"),
    "bouncing": ("弹跳", "上下弹跳", "跳动", "上下跳动", "蹦跳", "弹来弹去"),
    "growing": ("变大", "逐渐变大", "慢慢变大", "越来越大", "放大", "不断变大"),
    "shrinking": ("变小", "逐渐变小", "慢慢变小", "越来越小", "缩小", "不断缩小"),
}
# {o} object(s), {i} -ing form, {f} finite form, {b} background phrase; a pattern without {b} gets none.
_PATTERN = {
    "en": {
        "train": (
            "{o} {i} {b}",
            "{o} {i} {b}",
            "{o} {f} {b}",
            "{o} {i}, {b}",
            "a video of {o} {i} {b}",
            "{b}, {o} {f}",
            "an animation of {o} {i}, {b}",
            "{o} that {f} {b}",
            "there is {o} {i} {b}",
            "a clip with {o} {i} {b}",
            "{b}: {o} {i}",
            "please draw {o} {i} {b}",
            "{o}, {i}, {b}",
            "show {o} {i} slowly {b}",
            "in this simple video {o} {f} {b}",
            "a short film where {o} {f}, {b}",
            "i want {o} {i} {b}",
            "{o} smoothly {i} {b}",
            "make {o} {f} {b}",
        ),
        "test": (
            "a short clip that shows {o} {i}, {b}",
            "we see {o} {i} {b}",
            "{b}, we can see that {o} {f}",
            "show me a video in which {o} {f} {b}",
            "an animation: {o} {i} smoothly {b}",
            "{o} slowly {f}, {b}",
        ),
    },
    "zh": {
        "train": (
            "{o}{b}{m}",
            "{b}，{o}{m}",
            "{b}，{o}在{m}",
            "{o}{m}，{b}",
            "{o}正在{m}，{b}",
            "一段{o}{m}的视频，{b}",
            "视频里{o}{m}，{b}",
            "{m}的{o}，{b}",
            "请画{o}{m}，{b}",
            "动画：{o}{m}，{b}",
            "{b}，有{o}在{m}",
            "一个简单的动画，{o}{m}，{b}",
            "我想要{o}{m}，{b}",
            "画面中{o}{m}，{b}",
            "{o}，{m}，{b}",
            "短片里{o}缓缓{m}，{b}",
        ),
        "test": (
            "请生成一段视频：{b}，{o}正在{m}",
            "{b}，可以看到{o}在{m}",
            "{o}在画面里{m}，{b}",
            "短视频，{o}{m}，{b}",
            "我想看{o}{m}的动画，{b}",
        ),
    },
}
_POOR = {
    "en": ("blurry", "faded", "low contrast", "low quality", "blurred", "out of focus", "washed out", "poor quality"),
    "zh": ("模糊", "褪色", "低对比度", "低质量", "失焦", "画质差", "颜色暗淡"),
}


def _pick(rng: random.Random, table: Mapping[str, tuple[str, ...]], key: str) -> str:
    return rng.choice(table.get(key, (key,)))


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _english(things: list[Thing], rng: random.Random) -> tuple[str, str, str, bool]:
    """(object phrase, -ing, finite, motion already told) of one or two objects."""

    def move(motion: str) -> tuple[str, str, str]:
        if motion in _WAY:
            way = rng.choice(_WAY[motion])
            base, third, ing = (f"{verb} {way}" for verb in rng.choice(_GO))
            return base, third, ing
        return rng.choice(_CHANGE[motion])

    def noun(t: Thing) -> str:
        return f"{_pick(rng, _COLOUR['en'], t.colour)} {_pick(rng, _SHAPE['en'], t.shape)}"

    base, third, ing = move(things[0].motion)
    if len(things) == 1:
        word = noun(things[0])
        return (
            rng.choice(
                (_article(word), _article(word), _article(word), f"one {word}", f"the {word}", f"a single {word}")
            ),
            ing,
            third,
            False,
        )
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


def _chinese(things: list[Thing], rng: random.Random) -> tuple[str, str, bool]:
    def noun(t: Thing) -> str:
        colour = _pick(rng, _COLOUR["zh"], t.colour)
        return colour + (rng.choice(("的", "")) if colour.endswith("色") else "") + _pick(rng, _SHAPE["zh"], t.shape)

    move = rng.choice(_MOVE_ZH[things[0].motion])
    if len(things) == 1:
        return rng.choice(("一个", "一个", "一个", "一只", "单个")) + noun(things[0]), move, False
    if things[0] == things[1]:
        return rng.choice(("两个", "两个", "一对")) + noun(things[0]), move, False
    nouns = [rng.choice(("一个", "一个", "")) + noun(t) for t in things]
    if things[0].motion == things[1].motion:
        return nouns[0] + rng.choice(("和", "与", "和")) + nouns[1] + rng.choice(("", "", "一起", "都")), move, False
    join = rng.choice(("，", "，", "并且", "，同时"))
    return (
        f"{nouns[0]}{move}{join}{nouns[1]}{rng.choice(_MOVE_ZH[things[1].motion])}",
        "",
        True,
    )


def caption(things: list[Thing], ground: str | None, language: str, split: str, rng: random.Random) -> str:
    """One caption. things: one or two objects in the order of telling; ground None leaves the background open."""
    where = (
        ""
        if ground is None
        else rng.choice(_GROUND_PHRASE[language][split]).format(_pick(rng, _GROUND[language], ground))
    )
    pattern = rng.choice(_PATTERN[language][split])
    if language == "en":
        phrase, ing, finite, told = _english(things, rng)
        if told:
            pattern = rng.choice([p for p in _PATTERN["en"][split] if "{i}" in p])
        text = pattern.format(o=phrase, i=ing, f=finite, b=where)
        text = " ".join(text.replace(" ,", ",").split()).strip(" ,:")
        return text.replace(", ,", ",").replace(",,", ",")
    phrase, move, told = _chinese(things, rng)
    if told:
        pattern = rng.choice(("{b}，{o}", "{o}，{b}") if split == "train" else ("短视频：{o}，{b}", "{b}，可以看到{o}"))
    text = pattern.format(o=phrase, m=move, b=where)
    while "，，" in text:
        text = text.replace("，，", "，")
    return text.strip("，：").replace("：，", "：")


def poor_caption(text: str, language: str, rng: random.Random) -> str:
    """A caption of a degraded clip: two to four words for its faults, and in half the cases what it shows."""
    faults = (", " if language == "en" else "，").join(rng.sample(_POOR[language], rng.randint(2, 4)))
    return faults if rng.random() < 0.5 else f"{text}, {faults}"


def names(colour: int, shape: int, motion: int) -> Thing:
    return Thing(list(COLOURS)[colour], SHAPES[shape], MOTIONS[motion])


class Prompt(NamedTuple):
    """A held-out prompt and what it asks for."""

    text: str
    things: list[Thing]
    ground: str


def held_out_prompts(n: int, language: str, seed: int = 1234, two: float = 0.35) -> list[Prompt]:
    """n prompts of held-out objects in held-out phrasings; a share `two` asks for two objects, half of them twins."""
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
