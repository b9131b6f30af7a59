from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.finish.plan import Finish, VideoFormat

SOURCE = VideoFormat(1280, 720, 16, 81)


def test_nothing_asked_is_nothing_done() -> None:
    assert Finish().steps == () and Finish.model_validate({}, strict=True) == Finish()
    assert Finish().result(SOURCE) == SOURCE


@pytest.mark.parametrize("keys", [("interpolate", "upscale"), ("upscale", "interpolate")])
def test_steps_run_in_the_order_in_which_they_stand(keys: tuple[str, ...]) -> None:
    values: dict[str, Any] = {"interpolate": {"fps": 32}, "upscale": 2}
    finish = Finish.model_validate({key: values[key] for key in keys}, strict=True)
    assert finish.steps == (*keys, "encode", "label")
    # A database that sorts keys, and one that keeps text, give the same plan back.
    stored = finish.model_dump(mode="json", exclude_none=True)
    assert Finish.model_validate(json.loads(json.dumps(stored, sort_keys=True)), strict=True) == finish
    assert Finish.model_validate_json(finish.model_dump_json()) == finish


def test_an_order_can_be_said() -> None:
    finish = Finish.model_validate({"interpolate": {"fps": 32}, "upscale": 4, "order": ["upscale", "interpolate"]})
    assert finish.order == ("upscale", "interpolate")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"interpolate": {"fps": 32}}, VideoFormat(1280, 720, 32, 161)),
        ({"interpolate": {"fps": 48}}, VideoFormat(1280, 720, 48, 241)),
        ({"interpolate": {"fps": 60}}, VideoFormat(1280, 720, 60, 301)),
        ({"interpolate": {"fps": 24}}, VideoFormat(1280, 720, 24, 121)),
        ({"interpolate": {"fps": 16}}, SOURCE),
        ({"upscale": 2}, VideoFormat(2560, 1440, 16, 81)),
        ({"upscale": {"factor": 4, "model": "fine"}, "interpolate": {"fps": 32}}, VideoFormat(5120, 2880, 32, 161)),
        ({"label": {"mark": "AI"}}, SOURCE),
    ],
)
def test_the_format_that_comes_out(fields: dict[str, Any], expected: VideoFormat) -> None:
    assert Finish.model_validate(fields, strict=True).result(SOURCE) == expected


def test_one_frame_stays_one() -> None:
    one = VideoFormat(64, 64, 16, 1)
    assert Finish.model_validate({"interpolate": {"fps": 60}}).result(one) == VideoFormat(64, 64, 60, 1)


def test_fewer_frames_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'interpolate\.fps' is 12, expected at least the video's own 16"):
        Finish.model_validate({"interpolate": {"fps": 12}}).result(SOURCE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sharpen": 1}, "Extra inputs are not permitted"),
        ({"interpolate": {"fps": 1000}}, "less than or equal to 120"),
        ({"interpolate": {"fps": 32, "model": "../x"}}, "String should match pattern"),
        ({"upscale": 3}, "Input should be 2 or 4"),
        ({"upscale": True}, "Input should be a valid dictionary"),
        ({"encode": {"codec": "h264", "container": "webm"}}, "expected 'av1' in a webm file"),
        ({"encode": {"codec": "av1", "pixel_format": "yuv444p"}}, "expected 'yuv420p' or 'yuv420p10le' with av1"),
        ({"upscale": 2, "order": ["interpolate"]}, "expected each of ['upscale'] once"),
        ({"order": ["upscale"]}, "expected each of [] once"),
        ({"label": {"mark": ""}}, "at least 1 character"),
    ],
)
def test_wrong_plans_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        Finish.model_validate(fields, strict=True)
    assert message in str(error.value)


def test_a_plan_needs_neither_numpy_nor_opencv() -> None:
    code = "import sys, serve_app.finish.plan; print(sorted({'numpy', 'cv2', 'av', 'torch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
