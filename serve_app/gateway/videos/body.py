"""A create request: from its fields to parameters, urgency, mail address and finishing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from serve_app.config import Config
from serve_app.errors import InvalidRequest
from serve_app.finish.plan import Finish
from serve_app.gateway.http.errors import ApiError
from serve_app.parameters import FRAME_MULTIPLE
from serve_app.request import (
    Params,
    Urgency,
    finishing,
    fitting_size,
    largest_frames,
    parse,
    recipient,
    resolve,
    urgency,
)

_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


@dataclass(frozen=True)
class Understood:
    """A create request that can be met.

    Attributes:
        params: the parameters of the video.
        urgency: how soon it is wanted.
        notify_email: address of a mail that says that the video has ended.
        finish: the steps that finish the decoded video.
    """

    params: Params
    urgency: Urgency
    notify_email: str | None
    finish: Finish | None


def understand(fields: dict[str, Any], config: Config, *, typed: bool = True) -> Understood:
    """Return what a create request asks for; `size` and `seconds` are translated.

    Raises:
        InvalidRequest: a field is wrong; `param` names it.
        ApiError: the request asks for a feature that this model does not have.
    """
    fields = dict(fields)
    if not typed and str(fields.get("degrade", "")).startswith("{"):
        try:
            fields["degrade"] = json.loads(fields["degrade"])
        except ValueError:
            message = f"'degrade' has value {repr(fields['degrade'])[:80]}, expected JSON."
            raise InvalidRequest("degrade", message) from None
    if fields.pop("input_reference", None) not in (None, ""):
        message = "'input_reference' is not supported: this model makes videos from text only."
        raise ApiError(400, "unsupported", message, "input_reference")
    size = fields.pop("size", None)
    if size is not None:
        _check_alone("size", fields, "width", "height")
        match = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if match is None:
            example = fitting_size(config.defaults.width, config.defaults.height, config.limits.pixels)
            raise InvalidRequest(
                "size", f"'size' has value {repr(size)[:80]}, expected WIDTHxHEIGHT, e.g. '{example}'."
            )
        fields["width"], fields["height"] = (int(side) if typed else side for side in match.groups())
    seconds = fields.pop("seconds", None)
    if seconds is not None:
        _check_alone("seconds", fields, "num_frames")
    if not typed and str(fields.get("finish", "")).lstrip().startswith("{"):
        fields["finish"] = _object("finish", fields["finish"])
    request = parse(fields, strict=typed)
    if seconds is not None:
        fps = config.defaults.fps if request.fps is None else request.fps
        # An impossible `fps` is refused below by its own name, so it must not make `seconds` look wrong.
        possible = 1 <= fps <= config.limits.fps
        most = largest_frames(config.limits.num_frames)
        request = request.model_copy(update={"num_frames": _frames(seconds, fps, most) if possible else 1})
    try:
        params = resolve(request, config)
        finish = finishing(request, params, config)
        return Understood(params, urgency(request), recipient(request, config), finish)
    except InvalidRequest as error:
        # Name the field that the client sent, not the one that it became.
        if size is not None and error.param in ("width", "height"):
            raise InvalidRequest("size", f"'size' has value {size!r}: {error.message}") from None
        raise


def _frames(seconds: Any, fps: int, most: int) -> int:
    """Return the possible number of frames that is nearest to a length in seconds.

    Raises:
        InvalidRequest: it is no length, or needs more than `most` frames.
    """
    try:
        length = math.nan if isinstance(seconds, bool) else float(seconds)
    except (TypeError, ValueError, OverflowError):
        length = math.nan
    frames = 0
    if 0 < length < 1e6:  # also refuses NaN
        frames = max(round((length * fps - 1) / FRAME_MULTIPLE), 0) * FRAME_MULTIPLE + 1
    if not 0 < frames <= most:
        raise InvalidRequest(
            "seconds",
            f"'seconds' has value {repr(seconds)[:80]}, expected a number above 0, at most {most / fps:g} "
            f"({most} frames at {fps} frames per second).",
        )
    return frames


def _object(name: str, text: str) -> dict[str, Any]:
    """Return the object that a field of a form spells as JSON."""
    try:
        return dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidRequest(name, f"'{name}' has value {repr(text)[:80]}, expected JSON: {reason}.") from None


def _check_alone(name: str, fields: dict[str, Any], *others: str) -> None:
    for other in others:
        if fields.get(other) is not None:
            raise InvalidRequest(name, f"'{name}' and '{other}' are both given, expected one of them.")
