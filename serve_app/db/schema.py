"""Migrations of a database's tables to this version, by the revisions under `migrations/`.

A revision that only adds to the tables says so by its `oldest`: the oldest revision whose version still runs on them.
Processes of that version then go on and may start again, while those of this one are rolled out.

Knows no locks: the caller holds one in the transaction of the connection that it passes.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, delete, insert, inspect, select

from serve_app.db.tables import CompatibleRevision
from serve_app.errors import ConfigError, without_password
from serve_app.logs import get_logger

logger = get_logger(__name__)

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
        ConfigError: a version before the first revision made the tables, or a newer one that did not promise that this
            one runs on them.
    """
    config = alembic_config(connection)
    scripts = ScriptDirectory.from_config(config)
    heads = MigrationContext.configure(connection).get_current_heads()
    known = {script.revision for script in scripts.walk_revisions()}
    url = without_password(str(connection.engine.url))
    unknown = [revision for revision in heads if revision not in known]
    if unknown:
        newest = scripts.get_current_head()
        if _is_promised(connection, unknown[0], newest):
            logger.warning("a newer version made the tables", extra={"revision": unknown[0], "known": newest})
            return
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
        _promise(connection, scripts)


def _is_promised(connection: Connection, head: str, revision: str | None) -> bool:
    """Return whether the version of `revision` runs on tables of `head`, as the version that made them says."""
    if not inspect(connection).has_table(CompatibleRevision.__tablename__):
        return False
    promise = select(CompatibleRevision.head).where(
        CompatibleRevision.head == head, CompatibleRevision.revision == revision
    )
    return connection.scalar(promise) is not None


def _promise(connection: Connection, scripts: ScriptDirectory) -> None:
    """Note the revisions whose versions run on these tables: those back to the `oldest` of every later revision."""
    chain = list(scripts.walk_revisions())  # the newest first
    names = [script.revision for script in chain]
    reaches = [names.index(getattr(script.module, "oldest", script.revision)) for script in chain]
    promised = [name for place, name in enumerate(names) if all(reach >= place for reach in reaches[:place])]
    connection.execute(delete(CompatibleRevision))
    connection.execute(insert(CompatibleRevision), [{"head": names[0], "revision": name} for name in promised])


def revisions(connection: Connection) -> tuple[str | None, str | None]:
    """Return the revision of a database's tables, None if it has none, and the newest that this version knows."""
    scripts = ScriptDirectory.from_config(alembic_config(connection))
    heads = MigrationContext.configure(connection).get_current_heads()
    return (heads[0] if heads else None), scripts.get_current_head()
