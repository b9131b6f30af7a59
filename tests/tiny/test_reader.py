"""The benchmark's reader is right about rendered ground truth."""

import pytest
import torch

from benchmarks.tiny.reader import Seen, judge, read
from serve_app.tiny.recipe.captions import names
from serve_app.tiny.recipe.shapes import random_scenes, render


@pytest.mark.slow
def test_reader_knows_rendered_clips() -> None:
    n = 240
    scenes = random_scenes(n, torch.Generator().manual_seed(11))
    right = dict.fromkeys(("colour", "shape", "direction", "count"), 0)
    for start in range(0, n, 24):
        clips = render(scenes.pick(slice(start, start + 24)), 13, 96, 96)
        for i, clip in enumerate(clips, start):
            wanted = []
            for j in range(int(scenes.count[i])):
                thing = names(int(scenes.colour[i, j]), int(scenes.shape[i, j]), int(scenes.motion[i, j]))
                wanted.append(Seen(thing.colour, thing.shape, thing.motion))
            for question, ok in judge(read((clip.permute(1, 2, 3, 0) + 1) / 2), wanted).items():
                right[question] += ok
    assert {q: v / n for q, v in right.items() if v / n < 0.97} == {}


def test_reader_sees_wrong_answers() -> None:
    seen = [Seen("red", "circle", "left"), Seen("blue", "star", "up")]
    assert all(judge(seen, seen[::-1]).values())
    assert judge(seen, [seen[0]])["count"] is False
    verdict = judge(seen[:1], [Seen("red", "square", "right")])
    assert verdict == {"colour": True, "shape": False, "direction": False, "count": True}
    assert not any(judge([], seen).values())
