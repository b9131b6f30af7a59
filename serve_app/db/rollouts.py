"""The tables of rollouts, the same on SQLite and PostgreSQL. Times are seconds since the epoch.

They hold the pipelines that share the jobs, the generations of dispatchers, and the copies of jobs that a canary made.
"""

from __future__ import annotations

from typing import Literal

from sqlalchemy import Index, String
from sqlalchemy.orm import Mapped, mapped_column

from serve_app.db.tables import Base

PipelineState = Literal["stable", "canary", "retired", "aborted"]
GenerationState = Literal["current", "waiting", "retired"]
ShadowOutcome = Literal["running", "equal", "different", "other_revision", "failed"]


class ServedPipeline(Base):
    """A pipeline application that gets jobs, or got some. One is stable, and at most one is a canary.

    Jobs of a store without such rows go to `dispatcher.pipeline`.
    """

    __tablename__ = "pipelines"

    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    """The name of the Serve application."""
    state: Mapped[str] = mapped_column(String(16))
    """A `PipelineState`."""
    percent: Mapped[float] = mapped_column(default=0.0)
    """The share of owners whose new jobs a canary gets. The stable one has the rest."""
    since: Mapped[float]
    """The time from which it is in this state, and from which a canary is judged."""
    reason: Mapped[str | None]
    """The reason why it was aborted."""
    revision: Mapped[str | None] = mapped_column(String(64))
    """The revision of its weights; None until it has made a video."""
    wanted_at: Mapped[float | None]
    """The time at which a canary was given a job, while none of its jobs has begun to denoise or has ended since."""
    away_until: Mapped[float | None]
    """The time until which a canary that could not be reached gets no job."""
    verdict: Mapped[str | None]
    """The latest verdict about a canary, in a sentence."""


class Generation(Base):
    """The dispatchers that were deployed together, such as those of one cluster. Only the current one leases jobs."""

    __tablename__ = "generations"

    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    """A `GenerationState`."""
    since: Mapped[float]
    """The time from which it is in this state."""
    seen_at: Mapped[float]
    """The time at which one of its dispatchers was last there."""


class Shadow(Base):
    """A copy of a completed job that a canary makes, to be compared with the original."""

    __tablename__ = "shadows"

    job_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    pipeline: Mapped[str] = mapped_column(String(128), primary_key=True)
    at: Mapped[float]
    """The time at which it began, or ended."""
    outcome: Mapped[str] = mapped_column(String(16))
    """A `ShadowOutcome`."""
    error: Mapped[str | None]
    """Code and message of its failure."""
    seconds: Mapped[float | None]
    """Seconds that the copy took."""
    source_seconds: Mapped[float | None]
    """Seconds that the original took."""

    __table_args__ = (Index("shadows_by_pipeline", "pipeline", "at"),)
