"""Clips that finishing is measured on: rendered ones of the tiny model's world, decoded ones, and moving texture."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import cv2
import numpy as np
import torch

from serve_app.config import Config
from serve_app.request import Params
from serve_app.tiny import CHECKPOINT
from serve_app.tiny.recipe.shapes import COLOURS, MOTIONS, SHAPES, make_scenes, random_scenes, render
from serve_app.wan.generate import Generator

TWO = "two objects"
KINDS = (*MOTIONS, TWO)
PROMPTS = (
    "A red circle moves to the right on a white background",
    "A blue star bounces on a beige background",
    "A green square grows on a black background",
    "A yellow triangle moves up on a navy background",
)


def rendered(kind: str, count: int, size: int, frames: int, seed: int = 0) -> list[np.ndarray]:
    """Return clips `[frames, size, size, 3]`, uint8 RGB, of one kind of motion."""
    generator = torch.Generator().manual_seed(seed + KINDS.index(kind))
    if kind == TWO:
        scenes = random_scenes(count, generator, two=1.0)
    else:
        shape, colour = (torch.randint(len(of), (count, 2), generator=generator) for of in (SHAPES, COLOURS))
        motion = torch.full((count, 2), MOTIONS.index(kind))
        scenes = make_scenes(shape, colour, motion, torch.ones(count, dtype=torch.long), generator)
    clips = []
    for index in range(count):  # one by one: together they take gigabytes
        clip = render(scenes.pick(slice(index, index + 1)), frames, size, size)[0]
        pixels = ((clip + 1) * 127.5).round().clamp(0, 255).byte()
        clips.append(np.ascontiguousarray(pixels.permute(1, 2, 3, 0).numpy()))
    return clips


@cache
def _generator() -> Generator:
    return Generator(CHECKPOINT)


def decoded(prompt: str, steps: int = 20) -> np.ndarray:
    """Return a clip of the tiny model, `[33, 128, 128, 3]`, uint8 RGB."""
    defaults = Config.model_validate({"model": {"path": str(CHECKPOINT)}}).defaults.model_dump()
    values = {**defaults, "width": 128, "height": 128, "num_frames": 33, "num_inference_steps": steps, "seed": 0}
    return np.asarray(_generator().frames(Params(**values, prompt=prompt)))


def texture(frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Yield frames of a grainy texture that pans and turns: harder to encode than flat shapes."""
    random = np.random.default_rng(0)
    ground = np.zeros((height * 3 // 2, width * 3 // 2, 3), np.float32)
    for octave in (4, 16, 64):
        coarse = random.normal(size=(ground.shape[0] // octave, ground.shape[1] // octave, 3)).astype(np.float32)
        ground += cv2.resize(coarse, (ground.shape[1], ground.shape[0]), interpolation=cv2.INTER_CUBIC) * octave
    ground = cv2.normalize(ground, None, 0, 255, cv2.NORM_MINMAX)
    for index in range(frames):
        place = index % 160 if index % 320 < 160 else 160 - index % 160  # back and forth, within the ground
        turn = cv2.getRotationMatrix2D((ground.shape[1] / 2, ground.shape[0] / 2), 0.05 * place, 1.0)
        turn[:, 2] -= np.array([width / 4 - 80 + place * 0.9, height / 4 - 40 + place * 0.4])
        yield cv2.warpAffine(ground, turn, (width, height), flags=cv2.INTER_LINEAR).astype(np.uint8)
