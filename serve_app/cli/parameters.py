"""Options of a command that asks for a video: one for each field of a request."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from serve_app.parameters import EVERY


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
