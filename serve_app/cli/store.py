"""The job store of a configuration file, for the commands that act on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from serve_app.launch.shipped import config_file

if TYPE_CHECKING:
    from serve_app.jobs.store import JobStore

T = TypeVar("T")

ConfigFile = Annotated[
    Path,
    typer.Option("--config", callback=config_file, help="The configuration whose database is meant."),
]


def with_store(path: Path, use: Callable[[JobStore], Awaitable[T]], *, make: bool = False) -> T:
    """Start the job store of a configuration file, return the result of `use`, and close the store.

    Args:
        path: the configuration file.
        use: called with the store.
        make: create the database if there is none. Without it a missing database is an error, since the file or the
            folder is most likely a wrong one.

    Raises:
        ConfigError: the file cannot work, or its database cannot be opened.
    """
    # Imported here: most commands are clients of a server and need no database.
    from serve_app.config import load_file
    from serve_app.db.database import Database
    from serve_app.errors import ConfigError
    from serve_app.jobs.store import JobStore

    config = load_file(path)[1]

    file = Database(config.store_url).file
    if not make and file is not None and not file.exists():
        option = f"store.url has value {config.store.url!r}" if config.store.url else f"home has value '{file.parent}'"
        raise ConfigError(f"{option}: there is no database '{file}', expected that of something that was served")

    async def work() -> T:
        store = JobStore.of(config)
        await store.start()
        try:
            return await use(store)
        finally:
            await store.close()

    return asyncio.run(work())
