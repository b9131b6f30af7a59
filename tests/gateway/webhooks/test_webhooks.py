"""The API of webhook endpoints, through the unmodified openai SDK where it has them, else over plain HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve_app.config import WebhooksConfig
from serve_app.gateway.app import create_app
from serve_app.jobs.store import JobStore
from serve_app.storage import Storage
from tests.support.receiver import receiving
from tests.support.sending import completed
from tests.support.sites import OPTIONS, URL, Site, config_at

JSON = {"content-type": "application/json"}


async def test_the_sdk_manages_endpoints(sdk: openai.AsyncOpenAI) -> None:
    async with receiving() as receiver:
        made = await sdk.webhooks.create(name="mine", url=receiver.url, event_types=["video.completed"])
        assert made.object == "webhook_endpoint" and made.signing_secret.startswith("whsec_")
        assert made.signing_secret_hint is not None and made.signing_secret_hint.endswith(made.signing_secret[-4:])
        known = ["video.completed", "video.failed", "canary.aborted", "canary.promoted"]
        assert (await sdk.webhooks.event_types.list()).data == known
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
        assert event.type == "video.failed"

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
        # `admin` sees all endpoints; the owner of an endpoint decides which events it gets.
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
    for wrong in ("we_x", "we_" + "0" * 38, "%00", "a" * 5000):
        answer = await site.http.get(f"/v1/webhook_endpoints/{wrong}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), wrong
        answer = await site.http.post(f"/v1/webhook_endpoints/{wrong}/rotate_secret")
        assert answer.status_code == 404
    assert (await site.http.get("/v1/webhook_endpoints/%ff")).status_code == 400
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


def replace_options(**changes: Any) -> WebhooksConfig:
    return OPTIONS.model_copy(update=changes)
