"""Folders and files that a configuration names, made absolute once.

The processes of a deployment have other working folders than the process that starts it, so a relative path would mean
another place to each. Therefore the starting process makes paths absolute, and passes those on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from serve_app.config.section import Section
from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from serve_app.config.tree import Config

S = TypeVar("S", bound=Section)
Place = Callable[[str, str], Path]
"""Takes the name of an option and its path, and returns the absolute path."""


def placed(config: Config, place: Place, environ: Mapping[str, str] = os.environ) -> Config:
    """Return the configuration with every path that it names absolute, `home` included where it names none.

    Args:
        config: configuration with paths that may be relative.
        place: makes one path absolute.
        environ: may hold `WAN_SERVE_HOME`.

    Raises:
        ConfigError: `place` refuses a path, or one begins with `~` of a user who has no home.
    """

    def moved(section: S, **options: str) -> S:
        """Return a section with the paths in some options made absolute; each has its name for messages."""
        given = {field: getattr(section, field) for field in options}
        return section.model_copy(
            update={field: str(place(options[field], path)) for field, path in given.items() if path}
        )

    storage = config.storage
    if storage.url and not storage.bucket:
        storage = moved(storage.model_copy(update={"url": folder_of(storage.url)}), url="storage.url")
    return config.model_copy(
        update={
            "home": str(place("home", config.home) if config.home else default_home(environ)),
            "model": moved(
                config.model,
                **({} if config.model.path == "tiny" else {"path": "model.path"}),
                sharded="model.sharded",
            ),
            "storage": storage,
            "store": config.store.model_copy(update={"url": _store_url(config.store.url, place)}),
            "finisher": moved(
                config.finisher,
                certificate="finisher.certificate",
                private_key="finisher.private_key",
                font="finisher.font",
            ).model_copy(
                update={
                    field: {
                        name: str(place(f"finisher.{field}.{name}", path))
                        for name, path in getattr(config.finisher, field).items()
                    }
                    for field in ("upscalers", "interpolators")
                }
            ),
            "webhooks": moved(config.webhooks, ca_file="webhooks.ca_file"),
            "mail": None if config.mail is None else moved(config.mail, ca_file="mail.ca_file"),
        }
    )


def below(folder: Path) -> Place:
    """Return a function that makes paths absolute which are relative to a folder."""

    def place(option: str, path: str) -> Path:
        return folder.absolute() / home_of(option, path)

    return place


def home_of(option: str, path: str) -> Path:
    """Return a path with `~` replaced.

    Raises:
        ConfigError: the path begins with `~` of an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{option} has value {path!r}, expected a path: that user has no home folder") from None


def default_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder `home` of a configuration that names none, relative to the current folder."""
    return home_of("WAN_SERVE_HOME", environ.get("WAN_SERVE_HOME") or "data").absolute()


def folder_of(url: str) -> str:
    """Return the path in a `file://` URL; any other text is returned as it is."""
    if not url.startswith("file://"):
        return url
    return unquote(urlsplit(url.replace("?", "%3F").replace("#", "%23")).path)


def sqlite_url(file: Path) -> str:
    """Return the SQLAlchemy URL of a file, whatever characters its name has."""
    from sqlalchemy.engine import URL  # imported late: most processes that have a configuration open no database

    return URL.create("sqlite+aiosqlite", database=str(file)).render_as_string(hide_password=False)


def _store_url(url: str, place: Place) -> str:
    if not url.startswith("sqlite"):
        return url
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # `Database` refuses it later, with a message of what is expected
        return url
    if parsed.database in (None, "", ":memory:"):
        return url
    file = str(place("store.url", str(parsed.database)))
    return parsed.set(database=file).render_as_string(hide_password=False)
