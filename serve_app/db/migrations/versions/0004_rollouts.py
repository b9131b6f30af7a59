"""Jobs have a pipeline; pipelines, generations of dispatchers and copies of jobs have tables. Nothing is taken away."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
oldest = "0002"
"""The oldest revision whose version still runs on these tables: nothing that it knows was taken away or renamed."""


def upgrade() -> None:
    """Migrate the tables to this revision."""
    for name, kind in (
        ("pipeline", sa.String(128)),
        ("tried_on", sa.String(128)),
        ("tried_at", sa.Double()),
        ("states", sa.String(16)),
    ):
        op.add_column("jobs", sa.Column(name, kind, nullable=True))
    op.create_index("jobs_by_trial", "jobs", ["tried_on", "tried_at"])
    op.create_table(
        "pipelines",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("percent", sa.Double(), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("revision", sa.String(64), nullable=True),
        sa.Column("wanted_at", sa.Double(), nullable=True),
        sa.Column("away_until", sa.Double(), nullable=True),
        sa.Column("verdict", sa.Text(), nullable=True),
    )
    op.create_table(
        "generations",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
    )
    op.create_table(
        "shadows",
        sa.Column("job_id", sa.String(64), primary_key=True),
        sa.Column("pipeline", sa.String(128), primary_key=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=True),
        sa.Column("source_seconds", sa.Double(), nullable=True),
    )
    op.create_index("shadows_by_pipeline", "shadows", ["pipeline", "at"])
    op.create_table(
        "compatible_revisions",
        sa.Column("head", sa.String(32), primary_key=True),
        sa.Column("revision", sa.String(32), primary_key=True),
    )


def downgrade() -> None:
    """Migrate the tables back to the revision before."""
    for name in ("compatible_revisions", "shadows", "generations", "pipelines"):
        op.drop_table(name)
    op.drop_index("jobs_by_trial", "jobs")
    for name in ("states", "tried_at", "tried_on", "pipeline"):
        op.drop_column("jobs", name)
