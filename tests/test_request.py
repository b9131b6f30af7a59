from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config import Config, Defaults, Limits
from serve_app.errors import InvalidRequest
from serve_app.gateway.videos.body import understand
from serve_app.parameters import MAX_DEADLINE_S
from serve_app.request import FIELDS, Params, Urgency, VideoRequest, parse, resolve, urgency

CONFIG = Config(
    defaults=Defaults(width=128, height=64, num_frames=33, num_inference_steps=8, negative_prompt="blurry"),
    limits=Limits(pixels=512 * 288, side=4096, num_frames=81, num_inference_steps=50, prompt_chars=100),
)


def test_defaults_fill_in() -> None:
    params = resolve(parse({"prompt": "a cat"}), CONFIG)
    assert (params.width, params.height, params.num_frames, params.fps) == (128, 64, 33, 16)
    assert (params.num_inference_steps, params.negative_prompt) == (8, "blurry")
    assert (params.guidance_scale, params.guidance_scale_2, params.flow_shift) == (4.0, 3.0, 12.0)
    assert 0 <= params.seed < 2**32
    assert params.seconds == 33 / 16 and params.latent_shape == (9, 8, 16) and params.guided


def test_a_seed_is_kept_or_drawn() -> None:
    assert resolve(VideoRequest(prompt="a", seed=0), CONFIG).seed == 0
    assert resolve(VideoRequest(prompt="a", seed=2**63 - 1), CONFIG).seed == 2**63 - 1
    for seed in (None, -1):
        drawn = {resolve(VideoRequest(prompt="a", seed=seed), CONFIG).seed for _ in range(20)}
        assert len(drawn) > 1 and min(drawn) >= 0
    assert resolve(parse({"prompt": "a", "seed": "-1"}, strict=False), CONFIG).seed >= 0


def test_one_guidance_speaks_for_both_experts() -> None:
    assert resolve(VideoRequest(prompt="a", guidance_scale=5), CONFIG).guidance_scale_2 == 5
    assert resolve(VideoRequest(prompt="a", guidance_scale=5, guidance_scale_2=2), CONFIG).guidance_scale_2 == 2
    assert resolve(VideoRequest(prompt="a", guidance_scale_2=2), CONFIG).guidance_scale == 4.0
    assert not resolve(VideoRequest(prompt="a", guidance_scale=1), CONFIG).guided


def test_an_empty_negative_prompt_is_a_choice() -> None:
    assert resolve(VideoRequest(prompt="a", negative_prompt=""), CONFIG).negative_prompt == ""


def test_forms_spell_numbers_as_text() -> None:
    fields = {"prompt": "a", "seed": "7", "guidance_scale": "2.5", "num_frames": "5"}
    request = parse(fields, strict=False)
    assert (request.seed, request.guidance_scale, request.num_frames) == (7, 2.5, 5)
    with pytest.raises(InvalidRequest, match="'num_frames' has value '5'"):
        parse(fields)


TIMES = "expected seconds since 1970, at most 31622400 from now."
SECONDS = "expected seconds above 0, at most 31622400."


def test_urgency_is_no_parameter() -> None:
    request = parse({"prompt": "a", "priority": "batch", "deadline_s": 90})
    assert urgency(request) == Urgency(priority="batch", deadline_s=90)
    assert not {"priority", "deadline_s"} & set(resolve(request, CONFIG).model_dump())
    assert urgency(parse({"prompt": "a"})) == Urgency() == Urgency(priority="standard", deadline_s=None)
    assert urgency(parse({"prompt": "a", "priority": None, "deadline_s": None})) == Urgency()
    assert urgency(parse({"prompt": "a", "deadline_s": "1.5"}, strict=False)).deadline_s == 1.5
    assert urgency(VideoRequest(prompt="a", deadline_s=MAX_DEADLINE_S)).deadline_s == MAX_DEADLINE_S


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"priority": "high"},
            "priority",
            "'priority' has value 'high': Input should be 'interactive', 'standard' or 'batch'.",
        ),
        ({"deadline_s": 0}, "deadline_s", f"'deadline_s' is 0.0, {SECONDS}"),
        ({"deadline_s": -1.5}, "deadline_s", f"'deadline_s' is -1.5, {SECONDS}"),
        ({"deadline_s": float("nan")}, "deadline_s", f"'deadline_s' is nan, {SECONDS}"),
        ({"deadline_s": float("inf")}, "deadline_s", f"'deadline_s' is inf, {SECONDS}"),
        ({"deadline_s": "soon"}, "deadline_s", "'deadline_s' has value 'soon': Input should be a valid number."),
        ({"start_at": -1}, "start_at", f"'start_at' is -1.0, {TIMES}"),
        ({"start_at": float("nan")}, "start_at", f"'start_at' is nan, {TIMES}"),
        ({"start_at": 1e18}, "start_at", f"'start_at' is 1e+18, {TIMES}"),
        ({"deadline_s": True}, "deadline_s", "'deadline_s' has value True: Input should be a valid number."),
    ],
)
def test_refused_urgency(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        urgency(parse({"prompt": "a", **fields}))
    assert (error.value.param, str(error.value)) == (param, message)


def test_a_start_lies_before_the_deadline() -> None:
    soon = time.time() + 100
    assert urgency(VideoRequest(prompt="a", start_at=soon, deadline_s=200)).start_at == soon
    assert urgency(VideoRequest(prompt="a", start_at=0, deadline_s=1)).start_at == 0
    with pytest.raises(InvalidRequest, match=r"'start_at' is .*, expected a time before the deadline") as error:
        urgency(VideoRequest(prompt="a", start_at=soon, deadline_s=50))
    assert error.value.param == "start_at"


def test_limits_are_inclusive() -> None:
    resolve(VideoRequest(prompt="x" * 100, width=512, height=288, num_frames=81, num_inference_steps=50), CONFIG)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "prompt", "'prompt' is required."),
        ({"prompt": " "}, "prompt", "'prompt' is empty, expected a description of the video."),
        ({"prompt": "x" * 101}, "prompt", "'prompt' has 101 characters, expected at most 100."),
        ({"prompt": "a", "colour": 1}, "colour", f"Unknown field 'colour', expected one of {', '.join(FIELDS)}."),
        ({"prompt": "a", "model": "sora"}, "model", "'model' is 'sora', expected 'wan2.2-t2v-a14b'."),
        (
            {"prompt": "a", "width": 100},
            "width",
            "'width' is 100, expected a positive multiple of 16; the nearest are 96 and 112.",
        ),
        (
            {"prompt": "a", "height": 0},
            "height",
            "'height' is 0, expected a positive multiple of 16; the nearest is 16.",
        ),
        (
            {"prompt": "a", "width": 512, "height": 512},
            "size",
            "'size' 512x512 is 262144 pixels, expected at most 147456, e.g. '384x384'.",
        ),
        ({"prompt": "a", "width": 9216, "height": 16}, "width", "'width' is 9216, expected 16 to 4096."),
        ({"prompt": "a", "width": 16, "height": 4112}, "height", "'height' is 4112, expected 16 to 4096."),
        ({"prompt": "a", "num_frames": 4}, "num_frames", "'num_frames' is 4, expected 4k+1; the nearest are 1 and 5."),
        ({"prompt": "a", "num_frames": 85}, "num_frames", "'num_frames' is 85, expected 4k+1 from 1 to 81."),
        ({"prompt": "a", "seed": -2}, "seed", f"'seed' is -2, expected 0 to {2**63 - 1}, or -1 to have one drawn."),
        ({"prompt": "a", "flow_shift": float("nan")}, "flow_shift", "'flow_shift' is nan, expected 0.01 to 100."),
        (
            {"prompt": "a", "guidance_scale": float("inf")},
            "guidance_scale",
            "'guidance_scale' is inf, expected 0 to 100.",
        ),
        ({"prompt": "a", "fps": True}, "fps", "'fps' has value True: Input should be a valid integer."),
    ],
)
def test_refusals_name_field_value_and_expectation(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        resolve(parse(fields), CONFIG)
    assert (error.value.param, str(error.value)) == (param, message)


ANY = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=2)
)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("frames", "num_frames"),
        ("steps", "num_inference_steps"),
        ("guidance", "guidance_scale"),
        ("cfg_scale", "guidance_scale"),
        ("guidance_2", "guidance_scale_2"),
        ("duration", "seconds"),
        ("second", "seconds"),
        ("frame_rate", "fps"),
        ("FPS", "fps"),
        ("resolution", "size"),
        ("Size", "size"),
        ("numFrames", "num_frames"),
        ("num-frames", "num_frames"),
        ("negative", "negative_prompt"),
        ("negativ_prompt", "negative_prompt"),
        ("shift", "flow_shift"),
        ("sedd", "seed"),
        ("promt", "prompt"),
        ("text", "prompt"),
        ("deadline", "deadline_s"),
        ("email", "notify_email"),
    ],
)
def test_an_unknown_field_that_is_known_by_another_name(given: str, meant: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse({given: 1} if meant == "prompt" else {"prompt": "a", given: 1})
    assert (error.value.param, str(error.value)) == (given, f"Unknown field '{given}', did you mean '{meant}'?")


def refused(config: Config, **fields: Any) -> str:
    with pytest.raises(InvalidRequest) as error:
        understand({"prompt": "a", **fields}, config)
    return str(error.value)


@pytest.mark.parametrize("pixels", [256, 300, 128 * 128, 512 * 288, 1280 * 720])
@pytest.mark.parametrize("frames", [1, 4, 80, 81, 82, 161])
def test_what_an_error_proposes_is_taken(pixels: int, frames: int) -> None:
    defaults, limits = Defaults(width=16, height=16, num_frames=1), Limits(pixels=pixels, num_frames=frames)
    config = Config(defaults=defaults, limits=limits)

    def taken(**fields: Any) -> None:
        understand({"prompt": "a", **fields}, config)

    for size in ("big", "1280*720", 5, "99999x99999", "1280x1280", "80000x16", "16x80000", "3840x2160"):
        said = refused(config, size=size)
        proposed = re.findall(r"e\.g\. '(\d+x\d+)'", said)
        assert proposed or "expected 16 to" in said or "multiple of 16" in said, said
        for one in proposed:
            taken(size=one)
    for width, height in ((100, 16), (1, 16), (5000, 16), (250, 250), (-3, 16), (100, 10**6)):
        said = refused(config, width=width, height=height)
        for side in re.search(r"nearest (?:is|are) (.*)\.", said)[1].split(" and ") if "nearest" in said else ():
            taken(width=int(side), height=height if height % 16 == 0 else 16)
    for count in (0, -7, 2, 6, 79, 80, 83, 160, 10**9):
        if count % 4 == 1 and 1 <= count <= frames:
            continue
        said = refused(config, num_frames=count)
        for number in re.findall(r"\d+", said.partition("4k+1")[2]):
            taken(num_frames=int(number))
    for seconds in ("ten", 0, -1, 1000, float("nan"), True, "1e9"):
        for fps in (1, 16, 60):
            said = refused(config, seconds=seconds, fps=fps)
            assert said.startswith("'seconds' has value ") and f"at {fps} frames per second" in said, said
            taken(seconds=float(re.search(r"at most (\S+) ", said)[1]), fps=fps)
    assert "'fps' is 0" in refused(config, seconds=1000, fps=0)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*VideoRequest.model_fields, "other"]), ANY), st.booleans())
def test_any_fields_give_params_or_a_refusal(fields: dict[str, Any], strict: bool) -> None:
    try:
        request = parse(fields, strict=strict)
        params, wanted = resolve(request, CONFIG), urgency(request)
    except InvalidRequest as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 400
        return
    assert wanted.deadline_s is None or wanted.deadline_s > 0
    assert params.width * params.height <= CONFIG.limits.pixels and params.num_frames % 4 == 1
    assert Params.model_validate_json(params.model_dump_json()) == params
