"""Bodies and URLs of every kind: they are UTF-8 and of the declared type, or refused in one line."""

from __future__ import annotations

import json

import pytest

from serve_app.errors import InvalidRequest
from tests.gateway.conftest import Server
from tests.support.databases import count_queued

STAR = "一个黄色的星星"
UTF8 = STAR.encode()
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
PARTS = "multipart/form-data; boundary=x"
BOM = b"\xef\xbb\xbf"


def part(value: bytes, name: bytes = b"prompt", more: bytes = b"") -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="' + name + b'"' + more + b"\r\n\r\n" + value + b"\r\n"


def whole(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--x--\r\n"


def quoted(text: bytes) -> bytes:
    return "".join(f"%{byte:02x}" for byte in text).encode()


async def test_read_rightly(server: Server) -> None:
    body = json.dumps({"prompt": STAR}, ensure_ascii=False).encode()
    for kind, content in (
        (JSON, body),
        (JSON, BOM + body),
        (f"{JSON}; charset=utf-8", body),
        (f'{JSON};charset="UTF8"', body),
        (f"{JSON}; charset=us-ascii", json.dumps({"prompt": STAR}).encode()),
        (JSON.upper(), body),
        (FORM, b"prompt=" + UTF8),  # as curl sends what a terminal has
        (FORM, b"prompt=" + quoted(UTF8)),
        (FORM, BOM + b"prompt=" + UTF8),
        (f"{FORM}; charset=UTF-8", b"prompt=" + quoted(UTF8[:9]) + UTF8[9:]),
        (FORM, b"prompt=" + UTF8 + b"&seed=%2D1&size=64x64"),
        (PARTS, whole(part(UTF8))),
        (f"{PARTS}; charset=utf-8", whole(part(UTF8))),
        (PARTS, whole(part(UTF8, more=b"\r\nContent-Type: text/plain; charset=utf-8"))),
        (PARTS, whole(part(STAR.encode("gbk"), more=b"\r\nContent-Type: text/plain; charset=gbk"))),
        (PARTS, whole(part(STAR.encode("utf-16"), more=b"\r\nContent-Type: text/plain; charset=utf-16"))),
        # Browsers send an unused file input so.
        (PARTS, whole(part(UTF8), part(b"", b"input_reference", b'; filename=""'))),
        (PARTS, whole(part(b"", b"", b'; filename=""'), part(UTF8), part(b"", b"anything", b'; filename=""'))),
        (PARTS, whole(part(UTF8), part(b"", b"input_reference"))),
    ):
        answer = await server.http.post("/v1/videos", content=content, headers={"content-type": kind})
        assert answer.status_code == 200, (kind, content, answer.text)
        assert answer.json()["prompt"] == STAR, (kind, content)
    listed = (await server.http.get("/v1/videos", params={"limit": 100})).json()["data"]
    assert {video["prompt"] for video in listed} == {STAR}


async def test_refused(server: Server) -> None:
    latin = "schön".encode("latin-1")
    for kind, content, said in (
        (JSON, b'{"prompt": "' + latin + b'"}', "The body is not UTF-8"),
        (JSON, json.dumps({"prompt": "x"}).encode("utf-16"), "The body is not UTF-8"),
        (JSON, json.dumps({"prompt": "x"}).encode("utf-16-le"), "The body is not JSON"),
        (JSON, b"", "The body is empty"),
        (f"{JSON}; charset=latin-1", b'{"prompt": "x"}', "Content-Type has charset 'latin-1', expected utf-8."),
        (f"{JSON}; charset=utf-16", b'{"prompt": "x"}', "Content-Type has charset 'utf-16', expected utf-8."),
        (f"{JSON}; charset=nonsense", b'{"prompt": "x"}', "charset 'nonsense'"),
        (None, b'{"prompt": "x"}', "The header Content-Type is missing, expected application/json or multipart"),
        ("", b'{"prompt": "x"}', "Content-Type is ''"),
        ("text/plain", b'{"prompt": "x"}', "Content-Type is 'text/plain', expected application/json"),
        ("text/plain; application/json", b'{"prompt": "x"}', "Content-Type is 'text/plain; application/json'"),
        (f"{JSON}, text/plain", b'{"prompt": "x"}', "expected application/json"),
        (FORM, b"prompt=" + latin, "The form is not UTF-8"),
        (FORM, b"prompt=%ff", "The form is not UTF-8"),
        (FORM, b"prompt=" + quoted(latin), "The form is not UTF-8"),
        (FORM, b"prompt=x&%ff=y", "The form is not UTF-8"),
        (FORM, b"prompt=x&\xff=y", "The form is not UTF-8"),
        (f"{FORM}; charset=iso-8859-1", b"prompt=x", "charset 'iso-8859-1', expected utf-8"),
        (FORM, b'{"prompt": "x"}', "The body looks like JSON, but Content-Type is application/x-www-form-urlencoded"),
        (FORM, BOM + b' \n[{"prompt": "x"}]', "'Content-Type: application/json'"),
        (PARTS, b'{"prompt": "x"}', "The body looks like JSON, but Content-Type is multipart/form-data"),
        (FORM, b"&".join(b"a%d=" % n for n in range(101)), "too many fields"),
        (PARTS, whole(part(latin)), "'prompt' is not UTF-8"),
        (PARTS, whole(part(b"x", b"\xff")), "A name in the form is not UTF-8"),
        (PARTS, whole(part(b"x", b"input_reference", b'; filename="\xff.png"')), "The file name of 'input_reference'"),
        (PARTS, whole(part(b"x", more=b"\r\nContent-Type: text/plain; charset=nonsense")), "be read as 'nonsense'"),
        (PARTS, whole(part(b"\xff", more=b"\r\nContent-Type: text/plain; charset=ascii")), "be read as 'ascii'"),
        (f"{PARTS}; charset=latin-1", whole(part(b"x")), "charset 'latin-1', expected utf-8"),
        (PARTS, part(b"x") + part(b"1", b"seed")[:-2], "it ends before its last boundary"),
        (PARTS, whole(*(part(b"x", b"a%d" % n) for n in range(101))), "too many fields"),
        (PARTS, whole(part(b"x", b"seed", b'; filename=""'), part(b"x")), "'seed' is a file, expected text."),
        (PARTS, whole(part(b"", b"prompt", b'; filename="a"')), "'prompt' is a file, expected text."),
        ("multipart/form-data", whole(part(b"x")), "without a boundary"),
    ):
        headers = {} if kind is None else {"content-type": kind}
        answer = await server.http.post("/v1/videos", content=content, headers=headers)
        assert answer.status_code == 400, (kind, content, answer.text)
        message = answer.json()["error"]["message"]
        assert said in message and "\n" not in message, (kind, content, message)
    assert await count_queued(server.store) == 0 and server.pipeline.jobs == []


async def test_on_every_route(server: Server) -> None:
    """Routes whose body FastAPI reads answer like those that read it themselves."""
    video = await server.completed()
    endpoint = {"url": "https://hooks.example.com/", "name": "mine", "event_types": ["video.completed"]}
    made = await server.http.post("/v1/webhook_endpoints", json=endpoint)
    assert made.status_code == 200
    hooks = f"/v1/webhook_endpoints/{made.json()['id']}"
    for path, body in (
        (f"/v1/videos/{video['id']}/remix", {"prompt": STAR}),
        ("/v1/webhook_endpoints", endpoint),
        (hooks, {"name": "yours"}),
        (f"{hooks}/rotate_secret", {}),
        (f"{hooks}/replay", {"since": 0}),
    ):
        content = json.dumps(body).encode()
        for kind, sent in (
            (None, content),
            ("text/plain", content),
            (f"{JSON}; charset=latin-1", content),
            (JSON, content + b"\xff"),
            (FORM, content),
        ):
            headers = {} if kind is None else {"content-type": kind}
            answer = await server.http.post(path, content=sent, headers=headers)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "invalid_value"), (path, kind, error)
            assert "Content-Type" in error["message"] or "UTF-8" in error["message"], (path, kind, error)
        answer = await server.http.post(path, content=BOM + content, headers={"content-type": JSON})
        assert answer.status_code == 200, (path, answer.text)
    assert (await server.http.post(f"{hooks}/rotate_secret")).status_code == 200  # its body may be left out
    assert (await server.http.post(f"/v1/videos/{video['id']}/cancel")).status_code == 200


async def test_prompts_of_nothing(server: Server) -> None:
    video = await server.completed()
    for prompt in ("&nbsp;", "\u200b", "\ufeff\u00ad"):
        for answer in (
            await server.http.post("/v1/videos", json={"prompt": prompt}),
            await server.http.post("/v1/videos", data={"prompt": prompt}),
            await server.http.post(f"/v1/videos/{video['id']}/remix", json={"prompt": prompt}),
        ):
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt"), answer.text


async def test_urls(server: Server) -> None:
    for path in ("/v1/videos?after=%ff", "/v1/videos?x=%e4%b8", "/v1/videos/%ff", "/v1/models/%c3%28", "/%ff"):
        answer = await server.http.get(path)
        assert (answer.status_code, answer.json()["error"]["message"][-13:]) == (400, "is not UTF-8."), path
    answer = await server.http.get("/v1/videos/%E6%98%9F")
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "There is no video '星'.")
    answer = await server.http.get("/v1/videos?after=%E6%98%9F")
    assert "'after' has value '星'" in answer.json()["error"]["message"]
    reply: list[bytes] = []
    raw = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/v1/videos", "raw_path": b"/v1/videos"}
    scope = {**raw, "query_string": b"after=" + "星".encode(), "headers": [(b"host", b"localhost")], "scheme": "http"}

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b""}

    async def send(message: dict[str, object]) -> None:
        reply.append(bytes(message.get("body", b"")))  # type: ignore[call-overload]

    await server.app({**scope, "server": ("127.0.0.1", 80), "root_path": ""}, receive, send)  # type: ignore[arg-type]
    assert "'after' has value '星'" in json.loads(b"".join(reply))["error"]["message"]


async def test_the_handle_call_reads_prompts_alike(server: Server) -> None:
    from serve_app.gateway.videos.service import Videos

    async def wake() -> None:
        return None

    videos = Videos(server.config, server.store, server.storage, wake)
    assert (await videos.submit({"prompt": "x", "seed": -1})).seed >= 0
    with pytest.raises(InvalidRequest, match="'prompt' is empty once it is cleaned"):
        await videos.submit({"prompt": "&nbsp;"})
