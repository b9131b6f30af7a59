"""The vocabulary of the bundled model, compared with the captions that it was trained on."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from serve_app.tiny.recipe import captions
from serve_app.tiny.recipe.dataset import describe, scenes_for_training
from serve_app.tiny.vocabulary import WARNING, knows, warnings
from serve_app.tiny.words import FAULTS


@pytest.mark.parametrize("language", captions.LANGUAGES)
def test_all_that_it_was_trained_and_measured_on_is_known(language: str) -> None:
    assert all(knows(prompt.text) for prompt in captions.held_out_prompts(200, language))
    seen = describe(scenes_for_training(500, torch.Generator().manual_seed(1)), 4, random.Random(0))[0]
    faults = [fault for those in FAULTS.values() for fault in those]  # of negative prompts
    assert all(knows(caption) or any(fault in caption for fault in faults) for caption in seen)


@pytest.mark.parametrize(
    "prompt",
    [
        "A RED CIRCLE moves",
        "three boxes",
        "Stars!",
        "a five-pointed star",
        "two triangles,squares",
        "ａ ｒｅｄ ｃｉｒｃｌｅ",
        "红圆向左移动",
        "一个圆在公园里",
        "方块",
        "蓝色的星星在跳动",
        "a 圆形 on white",
        "椭圆旁边有一个正方形",
    ],
)
def test_a_prompt_that_names_a_shape_is_known(prompt: str) -> None:
    assert knows(prompt) and warnings(prompt) == []


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat rides a skateboard",
        "a red car moves to the right on a white background",
        "basketball players start an encircled boxing match",
        "一只猫在公园里奔跑",
        "红色的汽车向右移动",
        "一家人团圆吃汤圆",
        "一个椭圆和一个长方形",
        "ein roter Kreis",
        "円が右に動く",
        "🐈",
        "12345",
    ],
)
def test_a_prompt_that_names_none_is_warned_of(prompt: str) -> None:
    assert not knows(prompt) and warnings(prompt) == [WARNING]


def test_no_torch() -> None:
    code = "import sys, serve_app.tiny.vocabulary; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
