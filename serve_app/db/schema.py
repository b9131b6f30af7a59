"""Migrations of a database's tables to this version, by the revisions under `migrations/`.

Knows no locks: the caller holds one in the transaction of the connection that it passes.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from serve_app.errors import ConfigError, without_password

_FOLDER = Path(__file__).parent / "migrations"
# The table that every version has had, even those before the first revision.
_FIRST_TABLE = "jobs"


def alembic_config(connection: Connection) -> Config:
    """Return the configuration of Alembic's commands, without a file."""
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(_FOLDER).replace("%", "%%"))
    return config


def migrate(connection: Connection) -> None:
    """Create the tables, or migrate older ones.

    Raises:
        ConfigError: a newer version made the tables, or one before the first revision.
    """
    config = alembic_config(connection)
    scripts = ScriptDirectory.from_config(config)
    heads = MigrationContext.configure(connection).get_current_heads()
    known = {script.revision for script in scripts.walk_revisions()}
    url = without_password(str(connection.engine.url))
    unknown = [revision for revision in heads if revision not in known]
    if unknown:
        newest = scripts.get_current_head()
        raise ConfigError(
            f"store.url has value '{url}': its tables are at revision {unknown[0]!r}, which this version does not "
            f"know, expected at most {newest!r}; a newer version made them"
        )
    if not heads and inspect(connection).has_table(_FIRST_TABLE):
        raise ConfigError(
            f"store.url has value '{url}': its tables have no revision, expected an empty database or one that this "
            "version or an older one made"
        )
    if heads != (scripts.get_current_head(),):
        command.upgrade(config, "head")


def revisions(connection: Connection) -> tuple[str | None, str | None]:
    """Return the revision of a database's tables, None if it has none, and the newest that this version knows."""
    scripts = ScriptDirectory.from_config(alembic_config(connection))
    heads = MigrationContext.configure(connection).get_current_heads()
    return (heads[0] if heads else None), scripts.get_current_head()
