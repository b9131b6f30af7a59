"""Replicas of the denoiser come with the queue, and go with it."""

from __future__ import annotations

import threading

import pytest

from tests.stages.conftest import processes, until
from tests.stages.test_faults import drain, make, ranks


@pytest.mark.slow
def test_replicas_follow_the_queue(deploy):
    """One replica of the denoiser, two under load, one again."""
    app = deploy(
        denoiser={
            "autoscaling": {
                "min_replicas": 1,
                "max_replicas": 2,
                "target_queue_length": 2,
                "upscale_delay_s": 0,
                "downscale_delay_s": 1,
                "look_back_s": 11,
            }
        },
        limits={"num_inference_steps": 2000},
    )

    def replicas() -> int:
        return len(processes("ray::ServeReplica:wan:Denoiser"))

    until(lambda: replicas() == 1)
    responses = [app.pipeline.generate.remote(app.job(num_inference_steps=2000)) for _ in range(6)]
    listeners = [threading.Thread(target=drain, args=(response,), daemon=True) for response in responses]
    for listener in listeners:
        listener.start()
    until(lambda: replicas() == 2 and len(ranks()) == 2, 300)
    for response in responses:
        response.cancel()
    until(lambda: replicas() == 1 and len(ranks()) == 1, 300)
    make(app)
