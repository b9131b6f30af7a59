"""`wan-serve degrade`: how much less is offered under load. Works on the database, so no server has to run."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from serve_app.cli.store import ConfigFile, with_store

console = Console(highlight=False)


def degrade(
    config: ConfigFile,
    mode: Annotated[
        str | None,
        typer.Argument(
            metavar="[auto|off|LEVEL]",
            help="`auto` follows the queue; a level from 0 to 3 holds until this is called again; `off` is level 0.",
        ),
    ] = None,
) -> None:
    """Show how much less is offered to requests that allow it (`degrade`), or set it."""

    def run(found: tuple[str, int]) -> None:
        console.print(f"{found[0]}; level {found[1]}")

    if mode is not None:
        with_store(config, lambda store: store.set_degrade(mode))
    run(with_store(config, lambda store: store.degrade_level()))
