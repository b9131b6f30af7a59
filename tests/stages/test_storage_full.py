"""A storage whose disk is full when a sample is finished: nothing is denoised twice, and nothing half is left."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from serve_app.errors import JobFailed
from serve_app.events import Done
from tests.stages.conftest import Wan, until
from tests.support.disks import Disk, mounted


@pytest.fixture
def small_disk(pair: Wan) -> Iterator[Disk]:
    """A disk for the videos of this test."""
    videos = pair.path("videos")
    videos.mkdir(exist_ok=True)
    with mounted(videos) as disk:
        yield disk


def test_latents_are_kept_until_the_video_can_be_stored(pair: Wan, small_disk: Disk) -> None:
    app = pair
    job = app.job(seed=3)
    events: list[Any] = []

    def follow() -> None:
        events.extend(app.pipeline.generate.remote(job))

    small_disk.fill(leave=4096)  # room for the thumbnail, which is stored first
    following = threading.Thread(target=follow)
    following.start()
    until(app.path(f"{job.prefix}/thumbnail.jpg").exists)
    small_disk.free()
    following.join(60)
    *progress, done = events
    assert isinstance(done, Done)
    assert [event.step for event in progress if event.stage == "denoise"] == list(range(7))
    assert done.size_bytes == app.path(done.outputs["video"]).stat().st_size
    stored = [path for path in app.path(job.prefix).iterdir()]
    assert sorted(path.name for path in stored) == ["spritesheet.jpg", "thumbnail.jpg", "video.mp4"]

    small_disk.fill()
    with pytest.raises(JobFailed) as error:
        list(app.pipeline.generate.remote(app.job(seed=4)))
    failed = getattr(error.value, "cause", error.value)
    assert (failed.code, failed.retryable) == ("store_failed", True)
    small_disk.free()
