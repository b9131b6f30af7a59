"""The field `finish` of a request: profiles, limits, and messages that name the place."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.config import Config, validate
from serve_app.errors import ConfigError, InvalidRequest
from serve_app.finish.plan import Finish
from serve_app.request import finishing, parse, resolve

SMOOTH = {"interpolate": {"fps": 32}}
CONFIG = validate({"finisher": {"profiles": {"smooth": SMOOTH, "large": {"upscale": 2, "interpolate": {"fps": 48}}}}})


def plan(finish: Any, config: Config = CONFIG, **fields: Any) -> Finish | None:
    request = parse({"prompt": "a", "finish": finish, **fields})
    return finishing(request, resolve(request, config), config)


def test_profiles_are_looked_up() -> None:
    assert plan("smooth") == plan(SMOOTH) == Finish.model_validate(SMOOTH)
    found = plan("large")
    assert found is not None and found.order == ("upscale", "interpolate"), "the order of the YAML file holds"
    assert plan(found) == found, "a plan may be sent again, as `remix` does"


@pytest.mark.parametrize("finish", [None, {}])
def test_nothing_asked_is_nothing_made(finish: Any) -> None:
    assert plan(finish) is None


@pytest.mark.parametrize(
    ("finish", "message"),
    [
        ("soft", "'finish' is 'soft', expected a profile of this server ('large', 'smooth')."),
        (7, "'finish' has value 7, expected an object, or text."),
        ({"interpolat": {}}, "Unknown field 'finish.interpolat', did you mean 'finish.interpolate'?"),
        ({"encode": {"quallity": 3}}, "Unknown field 'finish.encode.quallity', did you mean 'finish.encode.quality'?"),
        ({"interpolate": {"fps": "32"}}, "'finish.interpolate.fps' has value '32': Input should be a valid integer."),
        ({"upscale": 3}, "'finish.upscale.factor' has value 3: Input should be 2 or 4."),
        (
            {"encode": {"container": "webm"}},
            "'finish.encode' has value {'container': 'webm'}: 'codec' is 'h264', expected 'av1' in a webm file.",
        ),
        (
            {"interpolate": {"fps": 8}},
            "'finish' cannot be used: 'interpolate.fps' is 8, expected at least the video's own 16.",
        ),
        ({"interpolate": {"fps": 120}}, "'finish.interpolate.fps' is 120, expected at most 60."),
        (
            {"upscale": {"factor": 2, "model": "esrgan"}},
            "'finish.upscale.model' is 'esrgan', expected none, since this server has no models.",
        ),
        ({"label": {"c2pa": True}}, "'finish.label.c2pa' is true, but this server has no certificate."),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_place(finish: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        plan(finish)
    assert (error.value.param, str(error.value)) == ("finish", message)


def test_a_finished_picture_has_a_largest_size() -> None:
    config = validate({"finisher": {"pixels": 2560 * 1440}})
    assert plan({"upscale": 2}, config, width=1280, height=720) is not None
    with pytest.raises(InvalidRequest, match=r"'finish.upscale' makes 5120x2880, expected at most 3686400 pixels"):
        plan({"upscale": 4}, config, width=1280, height=720)


def test_a_server_without_finishers_refuses() -> None:
    config = validate({"finisher": {"enabled": False}})
    with pytest.raises(InvalidRequest, match="this server finishes no videos"):
        plan(SMOOTH, config)
    assert plan({}, config) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profiles": {"a": {"interpolat": {}}}}, "unknown option 'finisher.profiles.a.interpolat', did you mean 'int"),
        ({"profiles": {"a": {"upscale": 3}}}, "finisher.profiles.a.upscale.factor has value 3, expected 2 or 4"),
        (
            {"profiles": {"a": {"upscale": {"factor": 2, "model": "x"}}}},
            "a.upscale.model is 'x', expected none",
        ),
        ({"certificate": "a.pem"}, "certificate and private_key are given alone, expected both or neither"),
        ({"autoscaling": {"min_replicas": -1}}, "finisher.autoscaling.min_replicas has value -1, expected greater"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate({"finisher": options})
    assert message in str(error.value)
