"""A load on a deployment that leaves nothing out of the metrics, and what a Prometheus has seen of it.

Its jobs are interactive and of a size that no other test asks for, and its refused requests are refused for a reason of
their own: so its numbers are told apart from those of the tests before, which may come seconds late.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx

from serve_app.metrics.catalog import STAGES
from tests.support.prometheus import Prometheus

_OWN = {"priority": "interactive", "size": "432x240", "num_frames": 1}
_SIZE, _PRIORITY = '{size="360p"}', '{priority="interactive"}'


@dataclass
class Load:
    """Some videos that complete, one that is cancelled while it runs, and requests that are refused.

    Attributes:
        url: the API.
        completed: resources of the videos that were made.
        created, begun, ended, refused: how many jobs or requests.
    """

    url: str
    completed: list[dict[str, Any]] = field(default_factory=list)
    created: int = 0
    begun: int = 0
    ended: int = 0
    refused: int = 0

    def make(self) -> None:
        """Send the requests and wait until all jobs have ended."""
        with httpx.Client(base_url=self.url, timeout=60) as http:
            waiting = [self._create(http, num_inference_steps=steps) for steps in (4, 6, 10)]
            long = self._create(http, num_inference_steps=2000)
            refused = http.post("/v1/videos", json={"prompt": "x", "input_reference": {"image_url": "x"}})
            assert refused.json()["error"]["code"] == "unsupported", refused.text
            self.refused += 1
            _until(http, long, lambda video: video["status"] == "in_progress" and video["stage"] == "denoise")
            http.post(f"/v1/videos/{long['id']}/cancel").raise_for_status()
            self.completed = [_until(http, video, _has_ended) for video in waiting]
            assert _until(http, long, _has_ended)["error"]["code"] == "cancelled"
            assert {video["status"] for video in self.completed} == {"completed"}
            for video in self.completed:
                http.get(f"/v1/videos/{video['id']}/content").raise_for_status()
        self.begun = self.ended = self.created

    def _create(self, http: httpx.Client, **fields: Any) -> dict[str, Any]:
        answer = http.post("/v1/videos", json={"prompt": "a star", **_OWN, **fields})
        answer.raise_for_status()
        self.created += 1
        return dict(answer.json())


def _has_ended(video: dict[str, Any]) -> bool:
    return video["status"] in ("completed", "failed")


def _until(http: httpx.Client, video: dict[str, Any], condition: Any) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while not condition(video):
        assert time.monotonic() < deadline and not (_has_ended(video) and condition is not _has_ended), video
        time.sleep(0.05)
        video = http.get(f"/v1/videos/{video['id']}").json()
    return video


@dataclass(frozen=True)
class Seen:
    """Numbers of a load that a Prometheus has at one moment, of all processes together."""

    ENDED: ClassVar[str] = f"sum(ray_wan_jobs_ended_total{_PRIORITY})"
    STEPS: ClassVar[str] = f"sum(ray_wan_step_seconds_count{_SIZE})"

    created: float
    refused: float
    ended: float
    completed: float
    waits: float
    steps: float
    step_s: float
    stages: dict[str, float]

    @classmethod
    def of(cls, prometheus: Prometheus) -> Seen:
        """Ask for all of them."""
        return cls(
            created=prometheus.value(f"sum(ray_wan_jobs_created_total{_SIZE})"),
            refused=prometheus.value('sum(ray_wan_jobs_refused_total{reason="unsupported"})'),
            ended=prometheus.value(cls.ENDED),
            completed=prometheus.value('sum(ray_wan_jobs_ended_total{reason="completed",priority="interactive"})'),
            waits=prometheus.value(f"sum(ray_wan_job_wait_seconds_count{_PRIORITY})"),
            steps=prometheus.value(cls.STEPS),
            step_s=prometheus.value(f"sum(ray_wan_step_seconds_sum{_SIZE})"),
            stages={
                stage: prometheus.value(f'sum(ray_wan_stage_seconds_sum{{size="360p",stage="{stage}"}}) or vector(0)')
                for stage in STAGES
            },
        )
