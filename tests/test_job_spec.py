from __future__ import annotations

import dataclasses
import pickle

import pytest

from serve_app.job_spec import JobSpec
from tests.support.fakes import PARAMS


def test_a_job_survives_the_way_to_another_process_and_cannot_be_changed() -> None:
    job = JobSpec("video_1", PARAMS, "videos/video_1/2", attempt=2, priority="batch", losses=1)
    assert pickle.loads(pickle.dumps(job)) == job
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.attempt = 3
