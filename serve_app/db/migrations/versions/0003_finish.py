"""A job may ask for its video to be finished after the decode, and says what came of it."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
oldest = "0002"
"""The oldest revision whose version still runs on these tables: nothing that it knows was taken away or renamed."""


def upgrade() -> None:
    """Migrate the tables to this revision."""
    for name in ("finish", "finish_result"):
        op.add_column("jobs", sa.Column(name, sa.JSON(), nullable=True))


def downgrade() -> None:
    """Migrate the tables back to the revision before."""
    for name in ("finish_result", "finish"):
        op.drop_column("jobs", name)
