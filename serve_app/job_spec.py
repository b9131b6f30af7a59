"""One attempt at a job, as the dispatcher hands it to the pipeline. Plain and picklable, without database or Ray."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from serve_app.config import Priority
from serve_app.finish.plan import Finish
from serve_app.request import Params


@dataclass(frozen=True)
class JobSpec:
    """A video to make, and where its files go."""

    id: str
    """The job's id."""
    params: Params
    """All that determines the pixels."""
    prefix: str
    """Storage folder of this attempt's files."""
    attempt: int = 1
    """Counted from 1. Later attempts go on from the last state that was saved."""
    state_prefix: str | None = None
    """Storage folder of the sample's saved states, which outlive the attempt. None: no state is saved."""
    priority: Priority = "standard"
    """The job's class."""
    created_at: float = field(default_factory=time.time)
    """When the job began to wait, in seconds since the epoch."""
    losses: int = 0
    """Number of groups of ranks that were lost during the same step of this job. Above 0 its steps are made alone."""
    pipeline: str | None = None
    """The pipeline application that makes it; None is the dispatcher's own."""
    finish: Finish | None = None
    """Steps that finish the decoded video; None keeps it as it is."""
