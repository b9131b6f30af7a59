"""Content of videos in S3: by a redirect to a presigned URL, or through the gateway."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest

from serve_app.config import StorageConfig as StorageOptions
from serve_app.gateway.app import create_app
from serve_app.storage import Storage
from tests.cli.test_generate import command
from tests.gateway.conftest import Server
from tests.gateway.http import test_content
from tests.gateway.http.test_content import DATA, test_file_is_gone
from tests.support.fakes import until
from tests.support.s3 import S3Server

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

__all__ = ["test_file_is_gone"]

VARIANTS = (("video", "mp4", "video/mp4"), ("thumbnail", "jpg", "image/jpeg"), ("spritesheet", "jpg", "image/jpeg"))


@pytest.fixture
def storage_options(s3_server: S3Server, s3_credentials: None) -> StorageOptions:
    return s3_server.options(s3_server.make_bucket(), "some/prefix")


async def test_redirects(server: Server) -> None:
    video_id = (await server.completed())["id"]
    url = f"/v1/videos/{video_id}/content"
    async with httpx.AsyncClient() as elsewhere:
        for variant, suffix, kind in VARIANTS:
            answer = await server.http.get(url, params={"variant": variant})
            assert (answer.status_code, answer.headers["cache-control"]) == (302, "private, no-store")
            file = await elsewhere.get(answer.headers["location"])
            assert (file.status_code, file.headers["content-type"]) == (200, kind)
            name = video_id if variant == "video" else f"{video_id}-{variant}"
            assert file.headers["content-disposition"] == f'inline; filename="{name}.{suffix}"'
        location = (await server.http.get(url)).headers["location"]
        assert (await elsewhere.get(location)).content == DATA
        part = await elsewhere.get(location, headers={"range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, DATA[100:200])
        etag = part.headers["etag"]
        assert (await elsewhere.get(location, headers={"if-none-match": etag})).status_code == 304
        head = await server.http.head(url)
        assert head.status_code == 302
        head = await elsewhere.head(head.headers["location"])
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(DATA)))


async def test_the_openai_sdk_follows(client: openai.AsyncOpenAI, server: Server) -> None:
    video = await client.videos.create_and_poll(prompt="a cat", poll_interval_ms=20)
    assert video.status == "completed"
    content = await client.videos.download_content(video.id)
    assert content.response.history and content.response.url.host == "127.0.0.1"
    assert "X-Amz-Signature" in str(content.response.url)
    assert "authorization" not in content.response.request.headers
    assert await content.aread() == DATA


async def test_the_command_line_follows(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    url = str(client.base_url).removesuffix("/v1/")
    assert (await command(url, "generate", "a cat", "-o", tmp_path / "out.mp4"))[0] == 0
    assert (tmp_path / "out.mp4").read_bytes() == DATA


async def test_delete_removes_the_objects(server: Server) -> None:
    video_id = (await server.completed())["id"]
    location = (await server.http.get(f"/v1/videos/{video_id}/content")).headers["location"]
    await server.http.delete(f"/v1/videos/{video_id}")

    async with httpx.AsyncClient() as elsewhere:

        async def gone() -> bool:
            return (await elsewhere.get(location)).status_code == 404 and not await server.storage.list("videos")

        await until(gone)


class TestProxy:
    """With `storage.proxy` the gateway answers as with a folder."""

    @pytest.fixture
    def storage_options(self, s3_server: S3Server, s3_credentials: None) -> StorageOptions:
        return s3_server.options(s3_server.make_bucket(), proxy=True)

    test_variants = staticmethod(test_content.test_variants)
    test_range_and_validators = staticmethod(test_content.test_range_and_validators)
    test_head = staticmethod(test_content.test_head)


async def test_a_storage_that_is_away(server: Server) -> None:
    video_id = (await server.completed())["id"]
    options = server.config.storage_options.model_copy(update={"endpoint": "http://127.0.0.1:1", "retry_s": 0})

    async def nothing() -> None:
        return None

    app = create_app(server.config, server.store, Storage(options), nothing, nothing)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        answer = await http.get(f"/v1/videos/{video_id}/content")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
        assert answer.headers["x-should-retry"] == "true"
        assert (await http.get(f"/v1/videos/{video_id}")).status_code == 200
