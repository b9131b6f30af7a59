"""The page of the command line, from typer's commands."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer

from docs.generate.markdown import cell, page, sentence, table
from serve_app.cli import cli

ROOT = Path(__file__).resolve().parents[2]


def commands(command: Any = None, path: tuple[str, ...] = ("wan-serve",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each command of `wan-serve` with its words, groups left out."""
    if command is None:
        command = typer.main.get_command(cli)
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))
    else:
        yield path, command


def cli_page() -> str:
    parts = [
        "# Command line",
        "`wan-serve` lies in `.venv/bin`. An error is one line on standard error, and the exit status is 1, or 2 for a "
        "wrong command line; `--debug` anywhere shows the traceback. Ctrl-C ends any command with status 130.",
    ]
    for path, command in commands():
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        options = [one for one in command.params if one.param_type_name == "option" and "--help" not in one.opts]
        usage = " ".join([*path, *(_argument(one) for one in arguments), *(["[OPTIONS]"] if options else [])])
        parts += [f"## {' '.join(path)}", f"```text\n{usage}\n```", sentence(command.help or "")]
        rows = [
            (_option(one), _choices(one), _cli_default(one), cell(getattr(one, "help", None) or ""))
            for one in (*arguments, *options)
        ]
        if rows:
            parts.append(table(rows, ("argument or option", "value", "default", "meaning")))
    return page(parts)


def _argument(one: Any) -> str:
    name = one.metavar or one.name.upper()
    return name if one.required else f"[{name}]"


def _option(one: Any) -> str:
    if one.param_type_name == "argument":
        return f"`{one.metavar or one.name.upper()}`"
    names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
    return f"{names} (or `${one.envvar}`)" if one.envvar else names


def _choices(one: Any) -> str:
    if getattr(one, "is_flag", False):
        return "flag"
    bounds = [f"{sign} {value:g}" for sign, value in (("≥", one.min), ("≤", one.max)) if value is not None]
    return " ".join([_value_kind(one.type_descriptor.annotation), ", ".join(bounds)]).strip()


def _value_kind(annotation: Any) -> str:
    inner = [one for one in get_args(annotation) if one is not type(None)]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if inner:
        return _value_kind(inner[0]) + (", repeatable" if get_origin(annotation) is list else "")
    if issubclass(annotation, Enum):
        return ", ".join(f"`{one.value}`" for one in annotation)
    return {"str": "text", "int": "whole number", "float": "number", "Path": "path"}.get(
        annotation.__name__, annotation.__name__
    )


def _cli_default(one: Any) -> str:
    value = one.default
    if one.required:
        return "required"
    if value is None or value in ([], ()) or type(value).__name__ == "Sentinel":
        return ""
    if isinstance(value, Path) and value.is_absolute():
        value = value.relative_to(ROOT)
    value = getattr(value, "value", value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
