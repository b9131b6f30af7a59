"""Samples that go from group to group: at the boundary of split experts, and off a replica that Serve takes away."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pytest

from serve_app.events import Done, Progress
from tests.stages.conftest import Wan, processes, until
from tests.stages.test_engine import Run


def replicas(deployment: str = "Denoiser") -> set[int]:
    return {process.pid for process in processes(f"ray::ServeReplica:wan:{deployment}")}


class Video:
    """A job through the whole pipeline, followed by a thread."""

    def __init__(self, app: Wan, **fields: Any) -> None:
        self.progress: list[Progress] = []
        self.done: Done | None = None
        self.error: Exception | None = None
        self.job = app.job(**fields)
        self.response = app.pipeline.generate.remote(self.job)
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        try:
            for event in self.response:
                if isinstance(event, Progress):
                    self.progress.append(event)
                else:
                    self.done = event
        except Exception as error:
            self.error = error

    @property
    def step(self) -> int:
        return max((p.step for p in self.progress if p.stage == "denoise"), default=0)

    def result(self, timeout_s: float = 120) -> Done:
        self.thread.join(timeout_s)
        assert self.done is not None, str(self.error) if self.error else "not finished in time"
        return self.done


def pixels(app: Wan, done: Done) -> bytes:
    """Return a video's frames as they were compressed, without the metadata, which names the job."""
    import av

    with av.open(str(app.path(done.outputs["video"]))) as container:
        return b"".join(bytes(packet) for packet in container.demux(video=0))


@pytest.mark.slow
def test_all_placements_of_the_experts_give_the_same_video_and_split_halves_the_memory(deploy):
    def weights(deployment: str) -> float:
        ranks = app.handle(deployment).describe.remote().result()["ranks"]
        return min(rank["weights_mib"] for rank in ranks)

    videos, memory = {}, {}
    turns = {"offload": "cpu", "resident_blocks": 0}
    for placement, more in {"together": {}, "swap": turns, "split": {}}.items():
        app = deploy(denoiser={"experts": placement, **more})
        names = ["Denoiser"] if placement != "split" else ["HighNoiseDenoiser", "LowNoiseDenoiser"]
        memory[placement] = [weights(name) for name in names]
        video = Video(app, seed=1)
        done = video.result()
        videos[placement] = pixels(app, done)
        assert [p.step for p in video.progress if p.stage == "denoise"] == list(range(7))
        steps = [app.handle(name).describe.remote().result()["steps"] for name in names]
        assert sum(steps) == 6 and all(steps), "both experts had something to do"
    assert videos["together"] == videos["swap"] == videos["split"]
    assert memory["swap"][0] < 0.7 * memory["together"][0]
    assert memory["split"][0] == pytest.approx(memory["together"][0] / 2)
    assert memory["split"][1] == pytest.approx(memory["together"][0] / 2)


@pytest.mark.slow
def test_where_only_one_expert_of_two_has_steps_the_other_hands_over_at_once(deploy):
    app = deploy(denoiser={"experts": "split"})
    high = Run(app, app.params(seed=2, boundary_ratio=0.0), "only-high", "HighNoiseDenoiser").result()
    sent = Run(app, app.params(seed=2, boundary_ratio=1.0), "only-low", "HighNoiseDenoiser")
    until(lambda: sent.moved is not None)
    assert sent.moved.state is None and sent.moved.high_noise is False
    low = pixels(app, Video(app, seed=2, boundary_ratio=1.0).result())
    app = deploy(denoiser={"experts": "together"})
    assert np.array_equal(high, Run(app, app.params(seed=2, boundary_ratio=0.0), "high").result())
    assert low == pixels(app, Video(app, seed=2, boundary_ratio=1.0).result())


@pytest.mark.slow
def test_a_replica_that_is_scaled_down_hands_its_sample_over_and_is_gone(deploy):
    """Two replicas run a sample each; two more waited for long enough to start the second. Serve then wants one."""
    app = deploy(
        denoiser={
            "autoscaling": {
                "min_replicas": 1,
                "max_replicas": 2,
                "target_queue_length": 2,
                "upscale_delay_s": 0,
                "downscale_delay_s": 1,
                "look_back_s": 11,
            },
            "max_ongoing_requests": 1,
            "shutdown_timeout_s": 300,
        },
        limits={"num_inference_steps": 2000},
    )
    steps = 2000
    videos = [Video(app, seed=0, num_frames=33, num_inference_steps=steps) for _ in range(4)]
    until(lambda: sum(video.step > 0 for video in videos) == 2)
    running = [video for video in videos if video.step > 0]
    for video in videos:
        if video not in running:
            video.response.cancel()
    until(lambda: len(replicas()) == 2)
    until(lambda: len(replicas()) == 1)
    assert all(video.done is None for video in running), "the samples were done before the replica was gone"
    first, second = (video.result(240) for video in running)
    assert pixels(app, first) == pixels(app, second)
    for video in running:
        told = [p.step for p in video.progress if p.stage == "denoise"]
        assert told == list(range(steps + 1)), "a step was done twice or left out"


@pytest.mark.slow
def test_a_rolling_update_under_load_loses_no_job_and_repeats_no_step(deploy):
    limits = {"limits": {"num_inference_steps": 2000}}
    app = deploy(denoiser={"shutdown_timeout_s": 120, "samples_per_step": 1}, **limits)
    expected = pixels(app, Video(app, seed=0, num_inference_steps=300).result())
    before = replicas()
    videos = [Video(app, seed=0, num_inference_steps=300) for _ in range(2)]
    until(lambda: all(video.step > 3 for video in videos), 30)
    app.redeploy()  # Serve takes every deployment for new
    more = [Video(app, seed=0, num_inference_steps=300) for _ in range(2)]
    for video in videos + more:
        assert pixels(app, video.result()) == expected
        told = [p.step for p in video.progress if p.stage == "denoise"]
        assert told == list(range(301)), "a step was done twice or left out"
    until(lambda: len(replicas()) == 1 and not replicas() & before)


@pytest.mark.slow
def test_process_titles_tell_the_role(deploy):
    deploy()
    assert len(processes("ray::Rank")) == 1
    for role in ("Encoder", "Denoiser", "Decoder", "Pipeline"):
        assert len(processes(f"ray::ServeReplica:wan:{role}")) == 1
    assert re.match("ray::Rank", processes("ray::Rank")[0].cmdline()[0])
