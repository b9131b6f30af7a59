"""A job's work is TFLOP. Before, it was pixels, from which they do not follow: that of jobs so far is not known."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Migrate the tables to this revision."""
    # A new column, because to empty the old one PostgreSQL would write every row, longer than a start may take.
    with op.batch_alter_table("jobs") as table:
        table.drop_column("work")
    op.add_column("jobs", sa.Column("work", sa.Double(), nullable=True))
