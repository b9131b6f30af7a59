"""HTTP beside the routes: HEAD, Allow, conditions, ranges, and clients that come and go."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from email.utils import format_datetime, parsedate_to_datetime

import pytest

from tests.gateway.conftest import Server, listening
from tests.support.fakes import until

JSON = {"content-type": "application/json"}


async def test_head_is_get_without_a_body(server: Server) -> None:
    video = await server.completed()
    made = await server.http.post(
        "/v1/webhook_endpoints",
        json={"url": "https://hooks.example.com/", "name": "x", "event_types": ["video.failed"]},
    )
    schema = (await server.http.get("/openapi.json")).json()
    paths = ["/", "/docs", "/docs/swagger-ui.css", "/openapi.json"]
    paths += [path for path, methods in schema["paths"].items() if "get" in methods]
    assert len(paths) > 14
    for path in paths:
        path = path.replace("{video_id}", video["id"]).replace("{model_id}", server.config.model.name)
        path = path.replace("{webhook_endpoint_id}", made.json()["id"])
        get, head = await server.http.get(path), await server.http.head(path)
        assert (head.status_code, head.content) == (get.status_code, b""), path
        for name in ("content-type", "content-length", "etag", "allow"):
            assert head.headers.get(name) == get.headers.get(name), (path, name)
    assert not [path for path, methods in schema["paths"].items() if "head" in methods]


async def test_head_of_events_ends(server: Server, held: asyncio.Event) -> None:
    video = await server.create()
    async with listening(server.app) as url:
        answer = await asyncio.wait_for(server.http.head(f"{url}/v1/videos/{video['id']}/events"), 60)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")


async def test_methods_that_are_allowed(server: Server) -> None:
    for path, allowed in (
        ("/v1/videos", "GET, HEAD, POST"),
        ("/v1/videos/video_1", "GET, HEAD, DELETE"),
        ("/v1/videos/video_1/content", "GET, HEAD"),
        ("/v1/videos/video_1/cancel", "POST"),
        ("/v1/webhook_endpoints/we_1", "GET, HEAD, POST, DELETE"),
        ("/healthz", "GET, HEAD"),
        ("/", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
    ):
        for method in ("PATCH", "OPTIONS"):
            answer = await server.http.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed), (method, path)


async def test_conditions(server: Server) -> None:
    url = f"/v1/videos/{(await server.completed())['id']}/content"
    first = await server.http.get(url)
    etag, date = first.headers["etag"], first.headers["last-modified"]
    moment = parsedate_to_datetime(date)
    before = format_datetime(moment.replace(year=2001), usegmt=True)
    after = format_datetime(moment.replace(year=moment.year + 1), usegmt=True)
    old = moment.strftime("%A, %d-%b-%y %H:%M:%S GMT")
    for headers, status in (
        ({"if-modified-since": date}, 304),
        ({"if-modified-since": old}, 304),
        ({"if-modified-since": after}, 304),
        ({"if-modified-since": before}, 200),
        ({"if-modified-since": "nonsense"}, 200),
        ({"if-modified-since": date, "if-none-match": '"x"'}, 200),
        ({"if-none-match": f'"a,b", W/{etag}'}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": etag, "range": "bytes=0-0"}, 304),
        ({"if-match": etag}, 200),
        ({"if-match": "*"}, 200),
        ({"if-match": f'"x", {etag}', "range": "bytes=0-0"}, 206),
        ({"if-match": '"x"'}, 412),
        ({"if-match": f"W/{etag}"}, 412),
        ({"if-match": '"x"', "if-none-match": etag}, 412),
        ({"if-unmodified-since": date}, 200),
        ({"if-unmodified-since": before}, 412),
        ({"if-unmodified-since": "nonsense"}, 200),
        ({"if-unmodified-since": before, "if-match": etag}, 200),
        ({"range": "bytes=0-0", "if-range": etag}, 206),
        ({"range": "bytes=0-0", "if-range": date}, 206),
        ({"range": "bytes=0-0", "if-range": f"W/{etag}"}, 200),
        ({"range": "bytes=0-0", "if-range": before}, 200),
        ({"range": "bytes=0-0", "if-range": after}, 200),
        ({"range": "bytes=9999999-", "if-range": '"x"'}, 200),
        ({"range": "Bytes=0-0"}, 206),
        ({"range": "BYTES=-1"}, 206),
        ({"range": "bytes=0-0,5-6"}, 200),
        ({"range": "items=0-0"}, 200),
        ({"range": "BYTES=9999999-"}, 416),
    ):
        for method in ("GET", "HEAD"):
            answer = await server.http.request(method, url, headers=headers)
            expected = 200 if method == "HEAD" and status in (206, 416) else status
            assert answer.status_code == expected, (method, headers)
            assert answer.headers["etag" if expected != 416 else "content-range"], (method, headers)
    answer = await server.http.get(url, headers=[("if-none-match", '"x"'), ("if-none-match", etag)])
    assert answer.status_code == 304
    error = (await server.http.get(url, headers={"if-match": '"x"'})).json()["error"]
    assert error["code"] == "precondition_failed" and "If-Match" in error["message"]


async def test_compressed_bodies(server: Server) -> None:
    body = gzip.compress(json.dumps({"prompt": "x"}).encode())
    for coding in ("gzip", "br", "GZIP", "deflate, gzip"):
        for path in ("/v1/videos", "/v1/webhook_endpoints"):
            answer = await server.http.post(path, content=body, headers={**JSON, "content-encoding": coding})
            assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
            assert answer.headers["accept-encoding"] == "identity" and coding in answer.json()["error"]["message"]
    headers = {**JSON, "content-encoding": "identity"}
    assert (await server.http.post("/v1/videos", content=b'{"prompt": "x"}', headers=headers)).status_code == 200


async def test_seeds_that_ask_for_one(server: Server) -> None:
    seeds = set()
    for _ in range(3):
        seeds.add((await server.create(seed=-1))["seed"])
        for more in ({"data": {"prompt": "x", "seed": "-1"}}, {"files": {"prompt": (None, "x"), "seed": (None, "-1")}}):
            answer = await server.http.post("/v1/videos", **more)
            seeds.add(answer.json()["seed"])
    assert len(seeds) == 9 and min(seeds) >= 0
    one = await server.create({"idempotency-key": "one"}, seed=-1)
    assert (await server.create({"idempotency-key": "one"}, seed=-1))["seed"] == one["seed"]
    remix = await server.http.post(f"/v1/videos/{one['id']}/remix", json={"prompt": "y"})
    assert remix.json()["seed"] == one["seed"]


async def test_a_client_that_waits_for_100(server: Server) -> None:
    body = b'{"prompt": "x"}'
    head = "POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\nexpect: 100-continue\r\ncontent-type: application/json\r\n"
    async with listening(server.app) as url:
        port = int(url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(body)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}content-length: 99999999\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")  # without sending it first
        writer.close()


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
async def test_a_client_that_leaves_is_no_error_of_ours(
    server: Server, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    video = await server.completed()
    async with listening(server.app) as url:
        port = int(url.rpartition(":")[2])
        for path in ("/v1/videos", f"/v1/videos/{video['id']}/remix", "/v1/webhook_endpoints"):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {kind}\r\ncontent-length: 1000\r\n\r\n"
            writer.write(head.encode() + b'{"prompt":')
            await writer.drain()
            writer.close()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /v1/videos/{video['id']}/content HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
        await writer.drain()
        writer.close()

        async def noticed() -> bool:
            return sum(record.getMessage() == "client left" for record in caplog.records) >= 3

        await until(noticed)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
