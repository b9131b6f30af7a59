from __future__ import annotations

import asyncio

import pytest

from serve_app.gateway.http.content import byte_range
from serve_app.gateway.http.errors import ApiError
from tests.gateway.conftest import Server

DATA = bytes(range(256)) * 782


async def test_variants(server: Server) -> None:
    video_id = (await server.completed())["id"]
    for variant, kind, content, name in (
        (None, "video/mp4", DATA, f"{video_id}.mp4"),
        ("video", "video/mp4", DATA, f"{video_id}.mp4"),
        ("thumbnail", "image/jpeg", b"\xff\xd8 thumbnail", f"{video_id}-thumbnail.jpg"),
        ("spritesheet", "image/jpeg", b"\xff\xd8 spritesheet", f"{video_id}-spritesheet.jpg"),
    ):
        query = {} if variant is None else {"variant": variant}
        answer = await server.http.get(f"/v1/videos/{video_id}/content", params=query)
        assert answer.status_code == 200
        assert answer.content == content
        assert answer.headers["content-type"] == kind
        assert answer.headers["content-length"] == str(len(content))
        assert answer.headers["content-disposition"] == f'inline; filename="{name}"'
        assert answer.headers["accept-ranges"] == "bytes"
    answer = await server.http.get(f"/v1/videos/{video_id}/content?variant=gif")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "variant")


async def test_range_and_validators(server: Server) -> None:
    url = f"/v1/videos/{(await server.completed())['id']}/content"
    size = len(DATA)
    for header, start, end in (("bytes=0-99", 0, 100), ("bytes=100-", 100, size), ("bytes=-7", size - 7, size)):
        answer = await server.http.get(url, headers={"range": header})
        assert (answer.status_code, answer.content) == (206, DATA[start:end])
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert answer.headers["content-length"] == str(end - start)
    answer = await server.http.get(url, headers={"range": f"bytes={size}-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")
    assert answer.json()["error"]["code"] == "range_not_satisfiable"
    etag = answer.headers.get("etag") or (await server.http.get(url)).headers["etag"]
    for header, status in ((etag, 304), (f'"x", W/{etag}', 304), ("*", 304), ('"x"', 200)):
        answer = await server.http.get(url, headers={"if-none-match": header})
        assert answer.status_code == status
        assert answer.headers["etag"] == etag and (answer.content == b"") == (status == 304)
    for header, status in ((etag, 206), ('"x"', 200)):
        answer = await server.http.get(url, headers={"range": "bytes=0-0", "if-range": header})
        assert answer.status_code == status


async def test_head(server: Server) -> None:
    url = f"/v1/videos/{(await server.completed())['id']}/content"
    answer = await server.http.head(url)
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", str(len(DATA)))
    for header in ("bytes=0-9", f"bytes={len(DATA)}-"):  # parts are for GET
        answer = await server.http.head(url, headers={"range": header})
        assert (answer.status_code, answer.headers["content-length"]) == (200, str(len(DATA)))


async def test_no_content_yet(server: Server, held: asyncio.Event) -> None:
    video_id = (await server.create())["id"]
    answer = await server.http.get(f"/v1/videos/{video_id}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_not_ready")
    assert answer.headers["x-should-retry"] == "false"
    await server.http.post(f"/v1/videos/{video_id}/cancel")
    await server.ended(video_id)
    answer = await server.http.get(f"/v1/videos/{video_id}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_failed")


async def test_file_is_gone(server: Server) -> None:
    video_id = (await server.completed())["id"]
    await server.storage.delete_prefix(f"videos/{video_id}")
    answer = await server.http.get(f"/v1/videos/{video_id}/content")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "The video is no longer stored."


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-0", (0, 1)),
        ("bytes=0-", (0, 10)),
        ("bytes=9-", (9, 10)),
        ("bytes=5-500", (5, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-50", (0, 10)),
        ("bytes = 1 - 2", (1, 3)),
        ("bytes=-", None),
        ("bytes=5-3", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
        ("bytes=a-b", None),
        ("bytes=" + "9" * 5000 + "-", None),
    ],
)
def test_byte_range(header: str | None, expected: tuple[int, int] | None) -> None:
    assert byte_range(header, 10) == expected


@pytest.mark.parametrize(("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0), ("bytes=-1", 0)])
def test_byte_range_outside(header: str, size: int) -> None:
    with pytest.raises(ApiError) as error:
        byte_range(header, size)
    assert error.value.headers == {"content-range": f"bytes */{size}"}
