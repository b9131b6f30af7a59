"""Web pages of other sites: they cannot use a server without keys, unless an option names them."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest

from serve_app.config import Config, GatewayConfig, validate
from serve_app.errors import ConfigError
from serve_app.gateway.app import create_app
from tests.gateway.conftest import Server, listening

OURS = "http://127.0.0.1"
FRIEND = "https://app.example.com"
JSON = {"content-type": "application/json"}
BODY = b'{"prompt": "a star"}'


def with_options(server: Server, **options: Any) -> httpx.AsyncClient:
    """Return the server with other options of the gateway."""
    args = server.config.model_dump(exclude={"gateway", "model"}) | {"gateway": options}
    return client_of(server, validate(args))


def client_of(server: Server, config: Config) -> httpx.AsyncClient:
    async def nothing() -> None:
        return None

    app = create_app(config, server.store, server.storage, nothing, nothing)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=OURS)


FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:8001"},
    {"origin": "http://localhost"},
    {"origin": "http://127.0.0.1.evil.example"},
    {"origin": "http://127.0.0.1@evil.example"},
    {"origin": "nonsense"},
    {"origin": ""},
    {"origin": "http://[", "sec-fetch-site": "same-origin"},
    {"origin": OURS, "sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
]


async def test_a_page_of_another_site_changes_nothing(server: Server) -> None:
    video = await server.completed()
    for method, path in (
        ("POST", "/v1/videos"),
        ("POST", f"/v1/videos/{video['id']}/remix"),
        ("POST", f"/v1/videos/{video['id']}/cancel"),
        ("DELETE", f"/v1/videos/{video['id']}"),
        ("POST", "/v1/webhook_endpoints"),
    ):
        for headers in FOREIGN:
            answer = await server.http.request(method, path, content=BODY, headers=JSON | headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (403, "foreign_origin"), (method, path, headers)
            assert "gateway.origins" in error["message"] and "gateway.public_url" in error["message"]
            assert "access-control-allow-origin" not in answer.headers
    listed = (await server.http.get("/v1/videos")).json()["data"]
    assert [one["id"] for one in listed] == [video["id"]]


async def test_its_own_page_and_programs_may(server: Server) -> None:
    for headers in (
        {},
        {"origin": OURS},
        {"origin": "http://127.0.0.1:80", "sec-fetch-site": "same-origin"},
        {"origin": "http://localhost:8000", "host": "localhost:8000"},
        {"origin": "http://[::1]:8000", "host": "[::1]:8000"},
        {"origin": "https://box.localhost", "host": "box.localhost:443"},
        {"sec-fetch-site": "none"},
    ):
        answer = await server.http.post("/v1/videos", content=BODY, headers=JSON | headers)
        assert answer.status_code == 200, (headers, answer.text)


EVIL = [
    *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost"),
    *("localhost@evil.example", "evil.example/localhost", "localhost?x", "[localhost]", "[::1]x", "[::1", "", ":8000"),
    *("localhost:x", "xn--bcher-kva.example", "2130706433.example"),
]


async def test_a_name_that_was_pointed_here_reads_nothing(server: Server) -> None:
    """DNS rebinding: to the browser, page and server have the same origin."""
    video = await server.completed()
    for host in EVIL:
        headers = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
        for method, path in (
            ("GET", "/v1/videos"),
            ("GET", f"/v1/videos/{video['id']}"),
            ("GET", f"/v1/videos/{video['id']}/content"),
            ("GET", f"/v1/videos/{video['id']}/events"),
            ("GET", "/v1/webhook_endpoints"),
            ("GET", "/v1/models"),
            ("POST", "/v1/videos"),
            ("DELETE", f"/v1/videos/{video['id']}"),
        ):
            answer = await server.http.request(method, path, headers=headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (403, "unknown_host"), (host, method, path)
            assert "gateway.hosts" in error["message"]
        head = await server.http.head(f"/v1/videos/{video['id']}/content", headers=headers)
        assert head.status_code == 403
        for path in ("/healthz", "/readyz"):  # probes of balancers name what they like
            assert (await server.http.get(path, headers={"host": host})).status_code == 200


HERE = socket.gethostname()


CALLED = [
    *("127.0.0.1", "127.0.0.1:8000", "127.1.2.3:1", "localhost", "LOCALHOST:8000", "localhost.", "a.localhost:3"),
    *("[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]:8000", "[::ffff:127.0.0.1]", "10.0.0.5:8000", "[fe80::1]:80"),
    *(HERE, f"{HERE.upper()}:8000", f"{HERE}."),
]


async def test_what_it_is_called(server: Server) -> None:
    for host in CALLED:
        assert (await server.http.get("/v1/videos", headers={"host": host})).status_code == 200, host


async def test_more_than_one_host_or_origin(server: Server) -> None:
    for headers in ([("host", "localhost"), ("host", "evil.example")], [("origin", OURS), ("origin", "http://e.com")]):
        answer = await server.http.post("/v1/videos", content=BODY, headers=[*JSON.items(), *headers])
        assert answer.status_code == 403


async def test_programs_that_name_no_host(server: Server) -> None:
    async with listening(server.app) as url:
        port = int(url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/videos HTTP/1.0\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"200"
        writer.close()


async def test_further_names(server: Server) -> None:
    options = {"hosts": ["Wan", "*.svc.cluster.local"], "public_url": "https://video.example.com/wan"}
    async with with_options(server, **options) as http:
        for host, status in (
            *(("wan", 200), ("WAN.:80", 200), ("a.b.svc.cluster.local:8000", 200), ("video.example.com", 200)),
            *(("svc.cluster.local", 403), ("x.wan", 403), ("example.com", 403), ("evilsvc.cluster.local", 403)),
        ):
            assert (await http.get("/v1/videos", headers={"host": host})).status_code == status, host
        # A proxy that ends TLS passes on our address, or the name of the page.
        for host in ("127.0.0.1:8000", "video.example.com", "wan"):
            for origin, status in (
                ("https://video.example.com", 200),
                ("https://video.example.com:444", 403),
                ("http://video.example.com:81", 403),
            ):
                headers = JSON | {"host": host, "origin": origin}
                answer = await http.post("/v1/videos", content=BODY, headers=headers)
                assert answer.status_code == status, (host, origin)


async def test_with_keys_names_do_not_matter(server: Server) -> None:
    """With keys host names are not checked: a page would have to know a key, and load balancers use any name."""
    config = server.config.model_copy(update={"auth": server.config.auth.model_copy(update={"mode": "keys"})})
    _, key = await server.key()
    async with client_of(server, config) as http:
        strange = {"host": "evil.example", "origin": "https://other.example", "sec-fetch-site": "cross-site"}
        assert (await http.post("/v1/videos", content=BODY, headers=JSON | strange)).status_code == 401
        answer = await http.post("/v1/videos", content=BODY, headers=JSON | strange | key)
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


async def test_a_page_that_was_named(server: Server) -> None:
    async with with_options(server, origins=[FRIEND, "http://localhost:3000"]) as http:
        asked = "authorization,content-type,idempotency-key,last-event-id,x-stainless-os"
        for origin in (FRIEND, "http://localhost:3000"):
            for method in ("GET", "POST", "DELETE"):
                ask = {"access-control-request-method": method, "access-control-request-headers": asked}
                answer = await http.options("/v1/videos", headers={"origin": origin, **ask})
                assert answer.status_code == 200
                assert answer.headers["access-control-allow-origin"] == origin
                assert answer.headers["access-control-allow-headers"] == asked
                assert method in answer.headers["access-control-allow-methods"]
                assert answer.headers["access-control-allow-credentials"] == "true"
                assert "Origin" in answer.headers["vary"]
        headers = {"origin": FRIEND, "sec-fetch-site": "cross-site"}
        made = await http.post("/v1/videos", content=BODY, headers=JSON | headers)
        assert made.status_code == 200, made.text
        await server.ended(made.json()["id"])
        content = f"/v1/videos/{made.json()['id']}/content"

        async def broken(*_: Any) -> Any:
            raise ZeroDivisionError

        for method, path, status, more in (
            ("GET", "/v1/videos", 200, {}),
            ("GET", f"/v1/videos/{made.json()['id']}/events", 200, {}),
            ("GET", content, 206, {"range": "bytes=0-9"}),
            ("GET", content, 416, {"range": "bytes=9999999-"}),
            ("GET", "/v1/videos/video_1", 404, {}),
            ("GET", "/nothing", 404, {}),
            ("PUT", "/v1/videos", 405, {}),
            ("POST", "/v1/videos", 413, {"content-length": "99999999"}),
            ("POST", "/v1/videos", 400, {}),
            ("GET", "/v1/videos", 403, {"host": "evil.example"}),
            ("GET", "/v1/videos", 500, {}),
        ):
            if status == 500:
                server.store.list = broken  # type: ignore[assignment, method-assign]
            answer = await http.request(method, path, headers=headers | more)
            assert answer.status_code == status, (method, path, answer.text)
            assert answer.headers["access-control-allow-origin"] == FRIEND, (method, path, status)
            assert answer.headers["access-control-allow-credentials"] == "true"
            exposed = answer.headers["access-control-expose-headers"].split(", ")
            assert {"x-request-id", "retry-after", "x-should-retry", "content-range", "etag"} <= set(exposed)
            assert "Origin" in answer.headers["vary"]


async def test_a_page_that_was_not_named(server: Server) -> None:
    async with with_options(server, origins=[FRIEND]) as http:
        for origin in ("https://evil.example", "null", FRIEND + ":8443", FRIEND + ".evil.example", "http" + FRIEND[5:]):
            ask = {"origin": origin, "access-control-request-method": "POST"}
            answer = await http.options("/v1/videos", headers=ask)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_origin")
            read = await http.get("/v1/videos", headers={"origin": origin})
            for one in (answer, read):
                assert not [name for name in one.headers if name.startswith("access-control-")]
                assert "Origin" in one.headers["vary"]
    assert "Origin" in (await server.http.get("/v1/videos")).headers["vary"]  # for caches in between


async def test_all_pages_with_keys(server: Server) -> None:
    args = server.config.model_dump(exclude={"gateway", "auth", "model"})
    config = validate(args | {"gateway": {"origins": "*"}, "auth": {"mode": "keys"}})
    _, key = await server.key()
    async with client_of(server, config) as http:
        for headers, status in ((key, 200), ({}, 401)):
            answer = await http.get("/v1/videos", headers={"origin": "https://any.example", **headers})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "*")
            assert "access-control-allow-credentials" not in answer.headers
        ask = {"origin": "null", "access-control-request-method": "DELETE"}
        ask["access-control-request-headers"] = "authorization"
        answer = await http.options("/v1/videos/video_1", headers=ask)
        assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (200, "authorization")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"origins": ["https://app.example.com/"]}, "gateway.origins.0 has value 'https://app.example.com/': expected"),
        ({"origins": ["app.example.com"]}, "expected an origin without a path"),
        ({"origins": ["null"]}, "expected an origin without a path"),
        ({"origins": "*"}, "origins is '*', expected with auth.mode 'keys'"),
        ({"hosts": ["http://wan:8000"]}, "gateway.hosts.0 has value 'http://wan:8000': expected a name"),
        ({"hosts": ["wan:8000"]}, "expected a name without scheme and port"),
        ({"hosts": ["*"]}, "expected a name without scheme and port"),
        ({"public_url": "video.example.com"}, "gateway.public_url has value 'video.example.com': expected the URL"),
        ({"public_url": "https://"}, "expected the URL that users call"),
        ({"public_url": "https://a:b"}, "expected the URL that users call"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate({"gateway": options})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_options_as_browsers_spell_them() -> None:
    gateway = GatewayConfig(
        origins=("HTTPS://App.Example.com:443", "http://[::1]:3000", "tauri://localhost"), hosts=("A.b.",)
    )
    assert gateway.origins == ("https://app.example.com", "http://[::1]:3000", "tauri://localhost")
    assert gateway.hosts == ("a.b",)
