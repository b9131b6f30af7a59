"""Run by Alembic for every command, on the connection that `serve_app.jobs.schema` hands over."""

from alembic import context

from serve_app.jobs import keys  # noqa: F401 (its table is part of the metadata)
from serve_app.jobs.notice import tables as notices  # noqa: F401 (its tables are part of the metadata)
from serve_app.jobs.tables import Base

connection = context.config.attributes["connection"]
# SQLite changes a table by copying it; `batch` says so in what `revision --autogenerate` writes.
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
context.run_migrations()
