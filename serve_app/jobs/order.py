"""The order of the queue as SQL, the same on SQLite and PostgreSQL.

An owner's jobs go by their effective deadlines (creation, or the requested start, plus the ageing time of the priority
class). Between owners, the one with the fewest running jobs goes first; among equals the one whose job has the earliest
effective deadline, where all that have passed count alike; then the one that was served longest ago. So an owner who
floods the queue, or marks every job as urgent, delays only their own jobs, and a free place goes to the owner with the
fewest running jobs. Owners at their limit of running jobs are passed over.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Select, and_, case, exists, func, or_, select
from sqlalchemy.orm import aliased

from serve_app.accounts.keys import at_running_limit
from serve_app.db.tables import Job, MaintenanceFlag

PAUSED = "paused"


def due(now: float, job: Any = Job, *, by_effective_deadline: bool = False) -> ColumnElement[bool]:
    """Return the condition that a job waits and may begin.

    Args:
        now: the database's time.
        job: the table or an alias of it.
        by_effective_deadline: read the rows in the order of their effective deadlines. Without this, SQLite would take
            the index on `not_before` instead.
    """
    not_before = job.not_before + 0.0 if by_effective_deadline else job.not_before
    return and_(job.status == "queued", not_before <= now, or_(job.deadline_at.is_(None), job.deadline_at > now))


def not_paused() -> ColumnElement[bool]:
    """Return the condition that jobs are not paused."""
    return ~exists(select(MaintenanceFlag.name).where(MaintenanceFlag.name == PAUSED))


def next_job(now: float) -> Select[str]:
    """Select the id of the job to begin next, among those whose rows nobody else is claiming."""
    return (
        select(Job.id)
        .where(due(now, by_effective_deadline=True), Job.owner == _next_owner(now), not_paused())
        .order_by(Job.effective_deadline, Job.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )


def _next_owner(now: float) -> Any:
    # This recursion steps from one owner to the next by the index; DISTINCT would read every waiting row.
    other, head, run, past = (aliased(Job) for _ in range(4))
    owners = select(func.min(Job.owner).label("owner")).where(Job.status == "queued").cte("owners", recursive=True)
    further = select(func.min(other.owner)).where(other.status == "queued", other.owner > owners.c.owner)
    owners = owners.union_all(select(further.scalar_subquery()).where(owners.c.owner.is_not(None)))
    ready = due(now, head, by_effective_deadline=True)
    effective_deadline = (
        select(head.effective_deadline)
        .where(ready, head.owner == owners.c.owner)
        .order_by(head.effective_deadline, head.id)
        .limit(1)
    )
    running = select(func.count()).where(run.status == "in_progress", run.owner == owners.c.owner)
    served_at = select(func.max(past.started_at)).where(past.owner == owners.c.owner)
    heads = (
        select(
            owners.c.owner,
            effective_deadline.scalar_subquery().label("effective_deadline"),
            running.scalar_subquery().label("running"),
            served_at.scalar_subquery().label("served_at"),
        )
        .where(owners.c.owner.is_not(None), owners.c.owner.not_in(at_running_limit()))
        .cte("heads")
        .prefix_with("MATERIALIZED")  # otherwise PostgreSQL computes each column again wherever it is named
    )
    return (
        select(heads.c.owner)
        .where(heads.c.effective_deadline.is_not(None))
        .order_by(
            heads.c.running,
            case((heads.c.effective_deadline > now, heads.c.effective_deadline), else_=now),
            func.coalesce(heads.c.served_at, 0),
            heads.c.effective_deadline,
        )
        .limit(1)
        .scalar_subquery()
    )
