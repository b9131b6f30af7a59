"""Every answer is counted by kind of route and class of status, and refused creates by their reason."""

from __future__ import annotations

import asyncio

import pytest

from serve_app.gateway.http.measure import route_of
from serve_app.metrics import catalog as metrics
from tests.gateway.conftest import Server

VIDEO = "/v1/videos/video_0123"


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("POST", "/v1/videos", "create"),
        ("POST", f"{VIDEO}/remix", "create"),
        ("GET", "/v1/videos", "list"),
        ("GET", "/v1/videos/", "list"),
        ("GET", VIDEO, "get"),
        ("HEAD", VIDEO, "get"),
        ("DELETE", VIDEO, "change"),
        ("POST", f"{VIDEO}/cancel", "change"),
        ("GET", f"{VIDEO}/content", "content"),
        ("GET", f"{VIDEO}/events", "events"),
        ("GET", "/v1/webhook_endpoints/we_1/deliveries", "webhooks"),
        ("GET", "/v1/models/wan2.2", "models"),
        ("GET", "/readyz", "health"),
        ("GET", "/", "page"),
        ("GET", "/docs", "page"),
        ("GET", "/secret/video_0123", "other"),
        ("BREW", "/v1/coffee", "other"),
    ],
)
def test_route(method: str, path: str, route: str) -> None:
    assert route_of(method, path) == route
    assert route in metrics.ROUTES


async def test_every_route_of_the_api_has_a_kind(server: Server) -> None:
    for path, methods in server.app.openapi()["paths"].items():
        for method in methods:
            assert route_of(method.upper(), path) != "other", path


async def test_answers_are_counted_and_timed(server: Server) -> None:
    def counts() -> list[float]:
        keys = [("create", "2xx"), ("create", "4xx"), ("content", "2xx"), ("other", "4xx")]
        return [metrics.http_requests.value(route=route, status=status) or 0 for route, status in keys]

    before, timed = counts(), metrics.http_seconds.count(route="create")
    video = await server.completed()
    await server.http.post("/v1/videos", json={"prompt": ""})
    await server.http.get(f"/v1/videos/{video['id']}/content")
    await server.http.get("/nothing")
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [1, 1, 1, 1]
    assert metrics.http_seconds.count(route="create") == timed + 2


async def test_refused_creates_are_counted_by_reason(server: Server, held: asyncio.Event) -> None:
    def refused(reason: str) -> float:
        return metrics.jobs_refused.value(reason=reason) or 0

    reasons = ("invalid_value", "unsupported", "queue_full", "idempotency_conflict")
    before = {reason: refused(reason) for reason in reasons}
    created = sum(sample.value for sample in metrics.jobs_created.samples())
    await server.http.post("/v1/videos", json={"prompt": "x", "num_frames": 6})
    await server.http.post("/v1/videos", json={"prompt": "x"}, headers={"idempotency-key": "a"})
    again = await server.http.post("/v1/videos", json={"prompt": "x"}, headers={"idempotency-key": "a"})
    assert again.status_code == 200
    await server.http.post("/v1/videos", json={"prompt": "y"}, headers={"idempotency-key": "a"})
    await server.store.pause()
    for _ in range(server.config.limits.queued_jobs + server.config.dispatcher.running_jobs):
        answer = await server.http.post("/v1/videos", json={"prompt": "x"})
        if answer.status_code == 429:
            break
    assert answer.json()["error"]["code"] == "queue_full"
    counted = {reason: refused(reason) - number for reason, number in before.items()}
    assert counted == {"invalid_value": 1, "unsupported": 0, "queue_full": 1, "idempotency_conflict": 1}
    queued = sum(sample.value for sample in metrics.jobs_created.samples()) - created
    assert queued == len((await server.http.get("/v1/videos?limit=100")).json()["data"])
    await server.store.resume()
