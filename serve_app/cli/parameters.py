"""Options of a command that asks for a video: one for each field of a request, and a short one for its finishing."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from serve_app.errors import ServeAppError
from serve_app.parameters import EVERY

FpsOut = Annotated[
    int | None,
    typer.Option(help="Frames per second of the finished video, made by interpolation after the decode, e.g. 32."),
]


def finish_field(finish: str | None, fps_out: int | None) -> dict[str, Any] | str | None:
    """Return the field `finish` of a request for the values of `--finish` and `--fps-out`; None for neither.

    Raises:
        ServeAppError: they do not go together, or the first begins like JSON and is none.
    """
    if finish is None or not finish.lstrip().startswith("{"):
        if fps_out is None:
            return finish
        if finish is not None:
            raise ServeAppError(f"--fps-out is given with --finish {finish!r}, expected one of them, or JSON")
    try:
        fields: dict[str, Any] = json.loads(finish or "{}")
    except ValueError as error:
        raise ServeAppError(f"--finish has value {finish!r}, expected a profile's name, or JSON: {error}") from None
    return fields if fps_out is None else {**fields, "interpolate": {**fields.get("interpolate", {}), "fps": fps_out}}


def with_parameters(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of a request in place of its `**fields`; see `serve_app.parameters`."""
    plain = [
        one for one in inspect.signature(command, eval_str=True).parameters.values() if one.kind != one.VAR_KEYWORD
    ]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                one.plain | None,
                typer.Option(*one.flags, f"--{name.replace('_', '-')}", help=one.meaning),
            ],
        )
        for name, one in EVERY.items()
        if one.flags is not None
    ]
    signature = inspect.Signature([*plain, *options], return_annotation=None)
    made: Any = command
    made.__signature__ = signature
    made.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
    return command
