"""Jobs know what their groups spent on them, what was predicted and how far they are saved; keys bound queued work."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
oldest = "0002"
"""The oldest revision whose version still runs on these tables: nothing that it knows was taken away or renamed."""


def upgrade() -> None:
    """Migrate the tables to this revision."""
    op.add_column("jobs", sa.Column("saved_step", sa.Integer(), nullable=False, server_default="0"))
    for name in ("group_s", "passes", "predicted_s"):
        op.add_column("jobs", sa.Column(name, sa.Double(), nullable=True))
    for name in ("degrade", "requested"):
        op.add_column("jobs", sa.Column(name, sa.JSON(), nullable=True))
    op.add_column("keys", sa.Column("queued_tflop", sa.Double(), nullable=True))
    op.add_column("keys", sa.Column("degrade", sa.JSON(), nullable=True))
    op.create_table(
        "degrade",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("mode", sa.String(16), nullable=False),
        sa.Column("level", sa.Integer(), nullable=False),
        sa.Column("changed_at", sa.Double(), nullable=False),
        sa.Column("over_since", sa.Double(), nullable=True),
        sa.Column("under_since", sa.Double(), nullable=True),
    )
    op.create_table(
        "replicas",
        sa.Column("application", sa.String(128), primary_key=True),
        sa.Column("deployment", sa.String(128), primary_key=True),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
    )
    columns = ["status", "turn", "id", "owner", "priority", "work", "not_before"]
    op.create_index("jobs_by_wait", "jobs", columns)


def downgrade() -> None:
    """Migrate the tables back to the revision before."""
    op.drop_index("jobs_by_wait", "jobs")
    for name in ("replicas", "degrade"):
        op.drop_table(name)
    for name in ("degrade", "queued_tflop"):
        op.drop_column("keys", name)
    for name in ("requested", "degrade", "predicted_s", "passes", "group_s", "saved_step"):
        op.drop_column("jobs", name)
