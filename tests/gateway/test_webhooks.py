"""The API of webhook endpoints: through the unmodified openai SDK where it has them, over plain HTTP where not."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import Request

from serve_app.config import Config, Mail, Webhooks
from serve_app.gateway.app import create_app
from serve_app.gateway.auth import Caller, Scope, caller
from serve_app.jobs.notice.notifier import Notifier
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from tests.gateway.conftest import Server
from tests.jobs.fakes import until
from tests.jobs.notice.receiver import receiving
from tests.jobs.notice.sending import completed

OPTIONS = Webhooks(
    allow_http=True,
    allow_networks=(ip_network("127.0.0.0/8"),),
    retries_s=(0, 0, 0),
    timeout_s=5,
    endpoints=5,
)
JSON = {"content-type": "application/json"}
URL = "https://hooks.example.com/videos"


@dataclass
class Site:
    """The application on a store of its own, with a notifier at work. A key is named by the header `x-key`."""

    store: JobStore
    http: httpx.AsyncClient

    async def create(self, url: str = URL, key: str = "", **fields: Any) -> dict[str, Any]:
        body = {"url": url, "name": "mine", "event_types": ["video.completed", "video.failed"], **fields}
        answer = await self.http.post("/v1/webhook_endpoints", json=body, headers={"x-key": key})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def log(self, endpoint: dict[str, Any]) -> list[dict[str, Any]]:
        answer = await self.http.get(f"/v1/webhook_endpoints/{endpoint['id']}/deliveries")
        assert answer.status_code == 200, answer.text
        return list(answer.json()["data"])

    async def ended(self, endpoint: dict[str, Any], count: int = 1) -> list[dict[str, Any]]:
        async def look() -> list[dict[str, Any]] | None:
            rows = await self.log(endpoint)
            return rows if len(rows) == count and all(row["status"] != "pending" for row in rows) else None

        return list(await until(look))


async def by_header(request: Request) -> Caller:
    """Stands in for keys: `x-key: ada read create`. Nothing is whoever needs no key."""
    key, *scopes = request.headers.get("x-key", "").split() or [""]
    if not key:
        return Caller()
    known: dict[str, Scope] = {"create": "create", "read": "read", "admin": "admin"}
    return Caller(key, frozenset(known[scope] for scope in scopes or ["create", "read"]))


def config_at(folder: Path, webhooks: Webhooks = OPTIONS, mail: Mail | None = None) -> Config:
    config = Config(home=str(folder), webhooks=webhooks, mail=mail)
    return config.model_copy(update={"dispatcher": config.dispatcher.model_copy(update={"poll_s": 0.03})})


@pytest.fixture
async def site(store: JobStore, tmp_path: Path) -> AsyncIterator[Site]:
    config = config_at(tmp_path)

    async def nothing() -> None:
        return None

    app = create_app(config, store, Storage(config.storage_url), nothing, nothing)
    app.dependency_overrides[caller] = by_header
    notifier = Notifier(store.database, config)
    notifier.start()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        yield Site(store, http)
    notifier.check()
    await notifier.stop()


@pytest.fixture
async def sdk(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    """Over the same application. The SDK has an httpx of its own, hence a real socket."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = site.http._transport.app  # type: ignore[attr-defined]
    listening = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(listening.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        yield client
    listening.should_exit = True
    await serving


async def test_the_sdk_manages_endpoints(sdk: openai.AsyncOpenAI) -> None:
    async with receiving() as receiver:
        made = await sdk.webhooks.create(name="mine", url=receiver.url, event_types=["video.completed"])
        assert made.object == "webhook_endpoint" and made.signing_secret.startswith("whsec_")
        assert made.signing_secret_hint is not None and made.signing_secret_hint.endswith(made.signing_secret[-4:])
        assert (await sdk.webhooks.event_types.list()).data == ["video.completed", "video.failed"]
        seen = await sdk.webhooks.retrieve(made.id)
        assert (seen.id, seen.url, seen.name) == (made.id, receiver.url, "mine")
        assert not hasattr(seen, "signing_secret")
        changed = await sdk.webhooks.update(made.id, name="yours", event_types=["video.failed", "video.completed"])
        assert (changed.name, changed.url) == ("yours", receiver.url)
        assert changed.event_types == ["video.completed", "video.failed"]
        others = [(await sdk.webhooks.create(name=f"{n}", url=URL, event_types=["video.failed"])).id for n in range(3)]
        assert [endpoint.id async for endpoint in sdk.webhooks.list(limit=2)] == [*others[::-1], made.id]

        tested = await sdk.webhooks.test(made.id, event_type="video.failed")
        assert (tested.status_code, tested.success, tested.event_type) == (204, True, "video.failed")
        request = receiver.requests[0]
        event = sdk.webhooks.unwrap(request.body, request.headers, secret=made.signing_secret)
        assert event.type == "video.failed"  # type: ignore[comparison-overlap]

        rotated = await sdk.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        await sdk.webhooks.test(made.id, event_type="video.completed")
        request = receiver.requests[1]
        assert len(request.headers["webhook-signature"].split(" ")) == 2
        for secret in (made.signing_secret, rotated.signing_secret):
            sdk.webhooks.unwrap(request.body, request.headers, secret=secret)
        last = await sdk.webhooks.rotate_secret(made.id)
        await sdk.webhooks.test(made.id, event_type="video.completed")
        request = receiver.requests[2]
        sdk.webhooks.unwrap(request.body, request.headers, secret=last.signing_secret)
        for secret in (made.signing_secret, rotated.signing_secret):
            with pytest.raises(openai.InvalidWebhookSignatureError):
                sdk.webhooks.unwrap(request.body, request.headers, secret=secret)

        deleted = await sdk.webhooks.delete(made.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "webhook_endpoint.deleted")
        with pytest.raises(openai.NotFoundError):
            await sdk.webhooks.retrieve(made.id)


async def test_a_video_over_http_is_told(server: Server) -> None:
    """From the request to the receiver: gateway, dispatcher and notifier on one store."""
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
    told = {(event.type, event.data.id) for event in events}  # type: ignore[union-attr]
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
    # Only a real event takes a receiver at its word.
    assert (await site.http.get(f"/v1/webhook_endpoints/{endpoint['id']}")).json()["enabled"] is True
    # A name that leads inside is found out when it is called.
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


async def test_the_endpoints_of_others_do_not_exist(site: Site) -> None:
    async with receiving() as receiver:
        endpoint = await site.create(receiver.url, key="ada")
        path = f"/v1/webhook_endpoints/{endpoint['id']}"
        eve = {"x-key": "eve"}
        calls: list[tuple[str, str, Any]] = [
            ("GET", path, None),
            ("POST", path, {"name": "hers"}),
            ("DELETE", path, None),
            ("POST", f"{path}/rotate_secret", {}),
            ("POST", f"{path}/test", {"event_type": "video.failed"}),
            ("POST", f"{path}/replay", {"since": 0}),
            ("GET", f"{path}/deliveries", None),
        ]
        for method, url, body in calls:
            answer = await site.http.request(method, url, json=body, headers=eve)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), (method, url)
        assert (await site.http.get("/v1/webhook_endpoints", headers=eve)).json()["data"] == []
        await completed(site.store, owner="eve")
        await completed(site.store, owner="ada")
        (row,) = await site.ended(endpoint)
        answer = await site.http.get(f"{path}/deliveries", headers={"x-key": "ada"})
        assert [one["id"] for one in answer.json()["data"]] == [row["id"]]
        # One who may see everything does; whose endpoint it is decides what it is told.
        admin = {"x-key": "root admin read create"}
        assert (await site.http.get(path, headers=admin)).json()["name"] == "mine"
        assert len((await site.http.get("/v1/webhook_endpoints", headers=admin)).json()["data"]) == 1
        assert len(receiver.requests) == 1
        seen = (await site.http.get(path, headers={"x-key": "ada"})).json()
        assert "signing_secret" not in seen and endpoint["signing_secret"] not in json.dumps(seen)


async def test_what_a_key_may(site: Site) -> None:
    body = {"url": URL, "name": "mine", "event_types": ["video.failed"]}
    for scopes, status in (("read", 403), ("admin", 403), ("create", 200), ("create admin", 200)):
        answer = await site.http.post("/v1/webhook_endpoints", json=body, headers={"x-key": f"ada {scopes}"})
        assert answer.status_code == status
    answer = await site.http.get("/v1/webhook_endpoints", headers={"x-key": "ada create"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope")
    assert len((await site.http.get("/v1/webhook_endpoints", headers={"x-key": "ada read"})).json()["data"]) == 2


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({}, "url"),
    ({"url": "ftp://x/"}, "url"),
    ({"url": "https://10.0.0.1/"}, "url"),
    ({"url": "https://0x7f.1/"}, "url"),
    ({"url": "https://[::1]/"}, "url"),
    ({"url": "https://user:password@example.com/"}, "url"),
    ({"url": "https://example.com:22/"}, "url"),
    ({"url": "https://example.com/#x"}, "url"),
    ({"url": "https://" + "a" * 3000}, "url"),
    ({"url": 5}, "url"),
    ({"url": None}, "url"),
    ({"name": ""}, "name"),
    ({"name": "x" * 201}, "name"),
    ({"name": "a\0b"}, "name"),
    ({"name": "a\nb"}, "name"),
    ({"event_types": []}, "event_types"),
    ({"event_types": ["batch.completed"]}, "event_types"),
    ({"event_types": "video.failed"}, "event_types"),
    ({"colour": "red"}, "colour"),
]


async def test_bad_fields(site: Site) -> None:
    endpoint = await site.create()
    for change, param in BAD:
        body = {"url": URL, "name": "x", "event_types": ["video.failed"], **change}
        if not change:
            del body["url"]
        answer = await site.http.post("/v1/webhook_endpoints", content=json.dumps(body), headers=JSON)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (str(change)[:80], answer.text)
        message = answer.json()["error"]["message"]
        assert message and "\n" not in message and len(message) < 400
        if change and None not in change.values():
            answer = await site.http.post(
                f"/v1/webhook_endpoints/{endpoint['id']}", content=json.dumps(change), headers=JSON
            )
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), str(change)[:80]
    assert len((await site.http.get("/v1/webhook_endpoints")).json()["data"]) == 1


async def test_bad_bodies_and_ids(site: Site) -> None:
    for content in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 40_000, b'{"url": "\\ud800", "name": "x"}'):
        answer = await site.http.post("/v1/webhook_endpoints", content=content, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), content[:20]
    for wrong in ("we_x", "we_" + "0" * 38, "%00", "a" * 5000, "%ff"):
        answer = await site.http.get(f"/v1/webhook_endpoints/{wrong}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), wrong
        answer = await site.http.post(f"/v1/webhook_endpoints/{wrong}/rotate_secret")
        assert answer.status_code == 404
    endpoint = await site.create()
    for path in ("", f"/{endpoint['id']}/deliveries"):
        for query, param in (
            ("after=x", "after"),
            ("after=%00", "after"),
            ("limit=0", "limit"),
            ("limit=101", "limit"),
        ):
            answer = await site.http.get(f"/v1/webhook_endpoints{path}?{query}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (path, query)


async def test_how_many(site: Site) -> None:
    for _ in range(5):
        await site.create(key="ada")
    body = {"url": URL, "name": "x", "event_types": ["video.failed"]}
    answer = await site.http.post("/v1/webhook_endpoints", json=body, headers={"x-key": "ada"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_endpoints")
    await site.create(key="eve")


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


async def test_plain_http_needs_the_option(store: JobStore, tmp_path: Path) -> None:
    config = config_at(tmp_path, replace_options(allow_http=False))

    async def nothing() -> None:
        return None

    app = create_app(config, store, Storage(config.storage_url), nothing, nothing)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        body = {"url": "http://hooks.example.com/", "name": "x", "event_types": ["video.failed"]}
        answer = await http.post("/v1/webhook_endpoints", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "url")
        assert "expected https" in answer.json()["error"]["message"]


def replace_options(**changes: Any) -> Webhooks:
    return OPTIONS.model_copy(update=changes)


async def test_mail_is_wanted_where_there_is_none(server: Server) -> None:
    for kind in ("json", "data"):
        fields: dict[str, Any] = {kind: {"prompt": "x", "notify_email": "ada@example.test"}}
        answer = await server.http.post("/v1/videos", **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "notify_email")
        assert "sends no mails" in answer.json()["error"]["message"]
    assert await server.store.count_queued() == 0


async def test_mail_is_wanted(server: Server) -> None:
    config = server.config.model_copy(update={"mail": Mail(host="x", sender="wan@video.test")})

    async def nothing() -> None:
        return None

    app = create_app(config, server.store, server.storage, nothing, nothing)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        for kind in ("json", "data"):
            fields: dict[str, Any] = {kind: {"prompt": "x", "notify_email": "ada+x@mail.example.test"}}
            answer = await http.post("/v1/videos", **fields)
            assert answer.status_code == 200 and "notify_email" not in answer.json()
            job = await server.store.get(answer.json()["id"])
            assert job is not None and job.notify_email == "ada+x@mail.example.test"
        await server.ended(answer.json()["id"])
        remix = await http.post(f"/v1/videos/{answer.json()['id']}/remix", json={"prompt": "y"})
        job = await server.store.get(remix.json()["id"])
        assert job is not None and job.notify_email is None
        for wrong in (
            *("", "ada", "@b.test", "ada@", "a@b.test, c@d.test", "a@b.test;c@d.test", "A <a@b.test>", "a b@c.test"),
            *("a@b.test\r\nBcc: c@d.test", "a@b.test\n", "a@b.test\0", "a@b..test", "a@[127.0.0.1]", '"a"@b.test'),
            *("李@b.test", "a@" + "b" * 300 + ".test", "a" * 65 + "@b.test"),
        ):
            answer = await http.post("/v1/videos", json={"prompt": "x", "notify_email": wrong})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "notify_email"), wrong
