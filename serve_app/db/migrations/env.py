"""Run by Alembic for every command, on the connection that `serve_app.db.schema` hands over."""

from alembic import context

from serve_app.db.tables import Base

connection = context.config.attributes["connection"]
# SQLite changes a table by copying it; `batch` says so in what `revision --autogenerate` writes.
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
context.run_migrations()
