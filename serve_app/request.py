"""A user's request (`VideoRequest`), the parameters that are then run (`Params`), and the urgency (`Urgency`).

Every default is filled in and every range is checked here. Knows the configuration, but neither HTTP nor the model.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from serve_app.config import LONGEST_SIDE, Config, Limits, is_mail_address
from serve_app.degrade import NEVER, Floor
from serve_app.errors import InvalidRequest
from serve_app.finish.plan import Finish, VideoFormat
from serve_app.parameters import (
    FRAME_MULTIPLE,
    HANDLING,
    MAX_DEADLINE_S,
    MAX_DELAY_S,
    PARAMETERS,
    RANDOM_SEED,
    SHORTHANDS,
    SIDE_MULTIPLE,
    Given,
    Parameter,
    Priority,
    Resolved,
)
from serve_app.prompt import says_something
from serve_app.spelling import unknown_field

_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class VideoRequest(Given):
    """A request for a video. Only `prompt` is needed; other fields that are None have the values in `defaults`."""

    model_config = ConfigDict(extra="forbid", frozen=True)


FIELDS = ("prompt", *SHORTHANDS, *(name for name in VideoRequest.model_fields if name != "prompt"))
"""Names of all fields that a create request may hold."""


class Params(Resolved):
    """The values of all generation parameters. With a given checkpoint they determine a video's pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def guided(self) -> bool:
        """True if classifier-free guidance runs. The first scale decides for both experts, as in WanPipeline."""
        return self.guidance_scale > 1.0

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents."""
        return ((self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8)

    @property
    def seconds(self) -> float:
        """Length of the video in seconds."""
        return self.num_frames / self.fps

    @property
    def format(self) -> VideoFormat:
        """Size and length of the decoded video."""
        return VideoFormat(self.width, self.height, self.fps, self.num_frames)


class Urgency(BaseModel):
    """The urgency of a video, which does not show in its pixels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    priority: Priority = "standard"
    deadline_s: float | None = None
    """Seconds from its creation after which the video is of no use."""
    start_at: float | None = None
    """Earliest start of work on it, as a Unix time; its waiting time counts from then."""
    degrade: Floor | Literal["never"] | None = None
    """The least that the request agrees to under load. None: what its key agrees to, if that is anything."""


def parse(fields: dict[str, Any], *, strict: bool = True) -> VideoRequest:
    """Return a request made of untyped fields; `strict=False` accepts numbers as text, as HTML forms send them.

    Raises:
        InvalidRequest: a field is unknown or has a wrong type; `param` names it.
    """
    try:
        return VideoRequest.model_validate(fields, strict=strict)
    except ValidationError as error:
        # Report an unknown field first: it may be a misspelt name of the one that is missing.
        errors = [one for one in error.errors() if not _is_other_kind(one, fields)]
        first = min(errors, key=lambda one: (one["type"] != "extra_forbidden", len(one["loc"]) > 1))
        if not first["loc"]:
            raise InvalidRequest(None, f"The fields cannot be read: {first['msg']}.") from None
        param = str(first["loc"][0])[:80]
        if len(first["loc"]) > 1:
            raise InvalidRequest(param, _nested(first)) from None
        if first["type"] == "extra_forbidden":
            raise InvalidRequest(param, unknown_field(param, FIELDS)) from None
        if first["type"] == "missing":
            raise InvalidRequest(param, f"'{param}' is required.") from None
        raise InvalidRequest(param, f"'{param}' has value {_short(first['input'])}: {first['msg']}.") from None


def _is_other_kind(error: Any, fields: dict[str, Any]) -> bool:
    """Return whether an error says that an object is no text, or a text no object, where a field may be either."""
    return len(error["loc"]) == 2 and error["type"] == (
        "string_type" if isinstance(fields.get(error["loc"][0]), dict) else "model_type"
    )


def _nested(error: Any) -> str:
    """Return what is wrong inside of a field that is an object."""
    field, _, *path = error["loc"]  # the second one names the type
    name = ".".join(map(str, [field, *path]))[:120]
    if error["type"] == "extra_forbidden":
        return unknown_field(str(path[-1])[:80], Finish.fields(path[:-1]), f"{name.rpartition('.')[0]}.")
    if error["type"] in ("model_type", "string_type"):
        return f"'{name}' has value {_short(error['input'])}, expected an object{'' if path else ', or text'}."
    return f"'{name}' has value {_short(error['input'])}: {error['msg'].removeprefix('Value error, ')}."


def resolve(request: VideoRequest, config: Config) -> Params:
    """Fill in the defaults, draw a seed if none is given, and check every range.

    Raises:
        InvalidRequest: a value is out of range; `param` names the field, the message its value and what is expected.
    """
    if request.model is not None and request.model != config.model.name:
        raise InvalidRequest("model", f"'model' is {_short(request.model)}, expected '{config.model.name}'.")
    values = {**config.defaults.model_dump(), **request.model_dump(exclude_none=True, exclude={*HANDLING})}
    # A request that gives only the first guidance scale gives both, as in WanPipeline.
    if request.guidance_scale is not None and request.guidance_scale_2 is None:
        values["guidance_scale_2"] = request.guidance_scale
    if values.get("seed", RANDOM_SEED) == RANDOM_SEED:
        values["seed"] = secrets.randbelow(2**32)
    params = Params(**values)
    for one in PARAMETERS.values():
        if one.kind is str:
            _check_text(one.name, getattr(params, one.name), getattr(config.limits, one.limit))
    if not says_something(params.prompt):
        nothing = " once it is cleaned" if params.prompt.strip() else ""
        raise InvalidRequest("prompt", f"'prompt' is empty{nothing}, expected a description of the video.")
    _check_size(params, config.limits)
    _check_frames(params.num_frames, config.limits)
    for one in PARAMETERS.values():
        if one.kind is not str and one.step == 1:  # the others are checked above
            _check_range(one, getattr(params, one.name), config.limits)
    return params


def _check_text(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise InvalidRequest(name, f"'{name}' has {len(text)} characters, expected at most {most}.")
    # JSON can spell these characters, but neither UTF-8 nor PostgreSQL can hold them.
    if _NO_TEXT.search(text):
        raise InvalidRequest(name, f"'{name}' holds a NUL character or half of a surrogate pair, expected text.")


def _check_size(params: Params, limits: Limits) -> None:
    width, height = params.width, params.height
    for name, side, other in (("width", width, height), ("height", height, width)):
        if side < SIDE_MULTIPLE or side % SIDE_MULTIPLE:
            most = min(limits.side, limits.pixels // min(max(other, SIDE_MULTIPLE), limits.pixels))
            near = nearest(side, SIDE_MULTIPLE, SIDE_MULTIPLE, most)
            raise InvalidRequest(
                name, f"'{name}' is {_short(side)}, expected a positive multiple of {SIDE_MULTIPLE}{near}."
            )
        _check_between(name, side, SIDE_MULTIPLE, min(limits.side, limits.pixels // SIDE_MULTIPLE))
    if width * height > limits.pixels:
        raise InvalidRequest(
            "size",
            f"'size' {width}x{height} is {width * height} pixels, "
            f"expected at most {limits.pixels}, e.g. '{fitting_size(width, height, limits.pixels)}'.",
        )


def _check_frames(frames: int, limits: Limits) -> None:
    most = largest_frames(limits.num_frames)
    if not 1 <= frames <= most:
        raise InvalidRequest("num_frames", f"'num_frames' is {_short(frames)}, expected 4k+1 from 1 to {most}.")
    if frames % FRAME_MULTIPLE != 1:
        near = nearest(frames, 1, FRAME_MULTIPLE, most)
        raise InvalidRequest("num_frames", f"'num_frames' is {frames}, expected 4k+1{near}.")


def _check_range(one: Parameter, value: Any, limits: Limits) -> None:
    if value is None and one.nullable:
        return
    most = getattr(limits, one.limit) if one.limit else one.most
    _check_between(one.name, value, one.least, most, f", or {one.besides}" if one.besides else "")


def largest_frames(most: int) -> int:
    """Return the largest valid number of frames up to `most`."""
    return (most - 1) // FRAME_MULTIPLE * FRAME_MULTIPLE + 1


def nearest(value: int, least: int, step: int, most: int) -> str:
    """Return words that name the valid values nearest to `value`: `least`, `least + step`, … up to `most`."""
    most = least + (most - least) // step * step
    below = least + (value - least) // step * step
    around = sorted({min(max(one, least), most) for one in (below, below + step)}) if most >= least else []
    if not around:
        return ""
    return f"; the nearest is {around[0]}" if len(around) == 1 else f"; the nearest are {around[0]} and {around[1]}"


def fitting_size(width: int, height: int, pixels: int) -> str:
    """Return the largest size of about this shape with at most so many pixels, as `WIDTHxHEIGHT`."""
    scale = min(math.sqrt(pixels / (width * height)), 1.0)
    across = max(int(width * scale) // SIDE_MULTIPLE, 1) * SIDE_MULTIPLE
    down = min(max(int(height * scale) // SIDE_MULTIPLE, 1), max(pixels // across // SIDE_MULTIPLE, 1)) * SIDE_MULTIPLE
    across = min(across, max(pixels // down // SIDE_MULTIPLE, 1) * SIDE_MULTIPLE)
    return f"{across}x{down}"


def urgency(request: VideoRequest) -> Urgency:
    """Return the urgency of a request.

    Raises:
        InvalidRequest: `deadline_s`, `start_at` or `degrade` is out of range, or `start_at` is not before the deadline.
    """
    deadline_s, start_at = request.deadline_s, request.start_at
    if deadline_s is not None and not 0 < deadline_s <= MAX_DEADLINE_S:  # also refuses NaN
        raise InvalidRequest(
            "deadline_s", f"'deadline_s' is {_short(deadline_s)}, expected seconds above 0, at most {MAX_DEADLINE_S}."
        )
    if start_at is not None:
        now = time.time()
        if not 0 <= start_at <= now + MAX_DELAY_S:
            raise InvalidRequest(
                "start_at",
                f"'start_at' is {_short(start_at)}, expected seconds since 1970, at most {MAX_DELAY_S} from now.",
            )
        if deadline_s is not None and start_at >= now + deadline_s:
            raise InvalidRequest("start_at", f"'start_at' is {_short(start_at)}, expected a time before the deadline.")
    degrade = None if request.degrade is None else Floor.parse(request.degrade) or NEVER
    return Urgency(priority=request.priority or "standard", deadline_s=deadline_s, start_at=start_at, degrade=degrade)


def finishing(request: VideoRequest, params: Params, config: Config) -> Finish | None:
    """Return the plan of a video's finishing with its profile looked up; None if the video stays as it is decoded.

    Raises:
        InvalidRequest: there is no such profile or model, or the finished video would be too large.
    """
    finish, options = request.finish, config.finisher
    if isinstance(finish, str):
        if finish not in options.profiles:
            known = ", ".join(f"'{name}'" for name in sorted(options.profiles))
            expected = f"a profile of this server ({known})" if known else "an object: this server has no profiles"
            raise InvalidRequest("finish", f"'finish' is {_short(finish)}, expected {expected}.")
        finish = options.profiles[finish]
    if finish is None or not finish.steps:
        return None
    if not options.enabled:
        raise InvalidRequest("finish", "'finish' is given, but this server finishes no videos (`finisher.enabled`).")
    for step, part, models in (
        ("interpolate", finish.interpolate, options.interpolators),
        ("upscale", finish.upscale, options.upscalers),
    ):
        if part is not None and part.model is not None and part.model not in models:
            expected = " or ".join(f"'{name}'" for name in sorted(models)) or "none, since this server has no models"
            raise InvalidRequest("finish", f"'finish.{step}.model' is {_short(part.model)}, expected {expected}.")
    if finish.label is not None and finish.label.c2pa and options.certificate is None:
        raise InvalidRequest("finish", "'finish.label.c2pa' is true, but this server has no certificate.")
    try:
        made = finish.result(params.format)
    except ValueError as error:
        raise InvalidRequest("finish", f"'finish' cannot be used: {error}.") from None
    if made.fps > (most := max(config.limits.fps, params.fps)):
        raise InvalidRequest("finish", f"'finish.interpolate.fps' is {made.fps}, expected at most {most}.")
    if max(made.width, made.height) > LONGEST_SIDE or made.width * made.height > options.pixels:
        raise InvalidRequest(
            "finish",
            f"'finish.upscale' makes {made.width}x{made.height}, expected at most {options.pixels} pixels and sides of "
            f"{LONGEST_SIDE}.",
        )
    return finish


def recipient(request: VideoRequest, config: Config) -> str | None:
    """Return the address that gets a mail when the video has ended, or None.

    Raises:
        InvalidRequest: it is not an address, or this server sends no mails.
    """
    address = request.notify_email
    if address is None:
        return None
    if config.mail is None:
        raise InvalidRequest("notify_email", "'notify_email' is given, but this server sends no mails (option `mail`).")
    if not is_mail_address(address):
        raise InvalidRequest("notify_email", f"'notify_email' is {_short(address)}, expected one address, name@domain.")
    return address


def _check_between(name: str, value: float, least: Any, most: Any, besides: str = "") -> None:
    if not least <= value <= most:  # also refuses NaN
        raise InvalidRequest(name, f"'{name}' is {_short(value)}, expected {least} to {most}{besides}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
