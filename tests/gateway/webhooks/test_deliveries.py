"""Deliveries to webhooks as the API shows them, with real receivers."""

from __future__ import annotations

import time
from typing import Any

import httpx
import openai

from serve_app.gateway.app import create_app
from serve_app.notify.notifier import Notifier
from tests.gateway.conftest import Server
from tests.support.fakes import until
from tests.support.receiver import receiving
from tests.support.sending import completed
from tests.support.sites import OPTIONS, Site


async def test_a_video_over_http_is_told(server: Server) -> None:
    """Gateway, dispatcher and notifier on one store: the way from request to receiver."""
    config = server.config.model_copy(update={"webhooks": OPTIONS})

    async def nothing() -> None:
        return None

    app = create_app(config, server.store, server.storage, nothing, nothing)
    notifier = Notifier(server.store.database, config)
    notifier.start()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with receiving() as receiver, httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        site = Site(server.store, http)
        endpoint = await site.create(receiver.url)
        good = await server.completed()
        server.pipeline.errors = [ZeroDivisionError("x")]
        bad = await server.ended((await server.create())["id"])
        rows = await site.ended(endpoint, 2)
    await notifier.stop()
    client = openai.OpenAI(api_key="none", webhook_secret=endpoint["signing_secret"])
    events = [client.webhooks.unwrap(request.body, request.headers) for request in receiver.requests]
    told = {(event.type, event.data.id) for event in events}
    assert told == {("video.completed", good["id"]), ("video.failed", bad["id"])}
    assert {row["event"]["data"]["id"] for row in rows} == {good["id"], bad["id"]}
    assert rows[0]["tries"][0]["status_code"] == 204 and rows[0]["next_try_at"] is None


async def test_test_says_what_came_back(site: Site) -> None:
    async with receiving() as receiver:
        endpoint = await site.create(receiver.url)
        path = f"/v1/webhook_endpoints/{endpoint['id']}/test"
        for status in (204, 500, 302, 410):
            receiver.answers = [status]
            answer = await site.http.post(path, json={"event_type": "video.completed"})
            assert (answer.status_code, answer.json()["status_code"]) == (200, status)
    answer = await site.http.post(path, json={"event_type": "video.completed"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "endpoint_unreachable")
    rows = await site.log(endpoint)
    assert [row["status"] for row in rows] == ["failed", "failed", "failed", "failed", "delivered"]
    assert [row["tries"][0]["status_code"] for row in rows] == [None, 410, 302, 500, 204]
    # A 410 to a sample event does not disable the endpoint.
    assert (await site.http.get(f"/v1/webhook_endpoints/{endpoint['id']}")).json()["enabled"] is True
    # A host name that leads to a private address is refused when it is called.
    endpoint = await site.create("http://localhost:9999/")
    answer = await site.http.post(
        f"/v1/webhook_endpoints/{endpoint['id']}/test", json={"event_type": "video.completed"}
    )
    assert answer.status_code == 400


async def test_disable_enable_replay(site: Site) -> None:
    async with receiving() as receiver:
        receiver.answers = [410]
        endpoint = await site.create(receiver.url)
        path = f"/v1/webhook_endpoints/{endpoint['id']}"
        await completed(site.store)
        (row,) = await site.ended(endpoint)
        seen = (await site.http.get(path)).json()
        assert (row["status"], seen["enabled"], seen["disabled_reason"]) == (
            "failed",
            False,
            "The receiver answered 410 Gone.",
        )
        body: dict[str, Any]
        for action, body in (("test", {"event_type": "video.failed"}), ("replay", {"since": 0})):
            answer = await site.http.post(f"{path}/{action}", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "endpoint_disabled")
        seen = (await site.http.post(path, json={"enabled": True})).json()
        assert (seen["enabled"], seen["disabled_reason"]) == (True, None)
        answer = await site.http.post(f"{path}/replay", json={"since": time.time() - 60})
        assert answer.json() == {
            "object": "webhook_endpoint.replay",
            "webhook_endpoint_id": endpoint["id"],
            "events": 1,
            "has_more": False,
        }
        (row,) = await site.ended(endpoint)
        assert row["status"] == "delivered" and len(row["tries"]) == 2
        answer = await site.http.post(f"{path}/replay", json={"event_id": row["event"]["id"]})
        assert answer.json()["events"] == 1

        async def again() -> bool:
            return len(receiver.requests) == 3

        await until(again)
        assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
        for body, status, param in (
            ({}, 400, "event_id"),
            ({"event_id": "evt_x", "since": 0}, 400, "event_id"),
            ({"event_id": "evt_" + "0" * 38}, 404, "event_id"),
            ({"since": -1}, 400, "since"),
            ({"since": "soon"}, 400, "since"),
        ):
            answer = await site.http.post(f"{path}/replay", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), body


async def test_the_log_has_pages(site: Site) -> None:
    async with receiving() as receiver:
        endpoint = await site.create(receiver.url)
        path = f"/v1/webhook_endpoints/{endpoint['id']}"
        for _ in range(3):
            await site.http.post(f"{path}/test", json={"event_type": "video.failed"})
    first = (await site.http.get(f"{path}/deliveries?limit=2")).json()
    assert first["has_more"] is True and len(first["data"]) == 2
    second = (await site.http.get(f"{path}/deliveries?limit=2&after={first['last_id']}")).json()
    assert second["has_more"] is False and len(second["data"]) == 1
    assert second["data"][0]["id"] < first["data"][1]["id"] < first["data"][0]["id"]
