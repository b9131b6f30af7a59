"""S3 alone: rights, presigned URLs, large uploads, and a server that dies or hangs."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app import config
from serve_app.errors import ConfigError
from serve_app.storage import Storage, StorageRefused
from serve_app.storage.bucket import PART_BYTES
from tests.storage.conftest import read
from tests.support.fakes import until
from tests.support.relay import Relay
from tests.support.s3 import ACCESS_KEY, SECRET_KEY, S3Server, start_server

LARGE = bytes(range(256)) * 160_000  # 41 MB: five parts
MEDIUM = LARGE[: PART_BYTES + 1]  # two parts
QUICK: dict[str, Any] = {"timeout_s": 3, "retry_s": 0.5}


@pytest.fixture(scope="module")
def fragile_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that these tests stop and freeze."""
    server = start_server(tmp_path_factory.mktemp("fragile"))
    yield server
    server.stop()


@pytest.fixture
def fragile(fragile_server: S3Server, s3_credentials: None) -> Iterator[S3Server]:
    """The server for those tests, running before the test and after it."""
    fragile_server.start()
    yield fragile_server
    fragile_server.thaw()


# Rights and wrong options.


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({}, {"AWS_SECRET_ACCESS_KEY": "guessed"}, r"403 SignatureDoesNotMatch.*\(AWS_ACCESS_KEY_ID, AWS_SECRET_"),
        ({}, {"AWS_ACCESS_KEY_ID": "nobody"}, r"403 SignatureDoesNotMatch.*\(AWS_ACCESS_KEY_ID, AWS_SECRET_"),
        ({"url": "s3://nosuchbucket"}, {}, r"404 NoSuchBucket The specified bucket does not exist. \(storage.url\)"),
        ({"region": "eu-west-1"}, {}, r"400 AuthorizationHeaderMalformed .*'us-east-1' \(storage.region\)"),
    ],
)
async def test_what_the_server_refuses_is_said_at_the_start(
    s3_options: config.StorageConfig,
    options: dict[str, Any],
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options_now = s3_options.model_copy(update=options)
    storage = Storage(options_now)
    with pytest.raises(ConfigError, match=message) as error:
        await storage.check()
    assert str(error.value).startswith(f"storage.url has value {options_now.url!r}: at http")
    assert "\n" not in str(error.value)
    with pytest.raises(StorageRefused, match=r"^storage: s3://"):
        await storage.ping()
    with pytest.raises(StorageRefused, match=r"^storage: s3://") as refused:
        await storage.put("videos/a", LARGE)
    assert "guessed" not in str(refused.value) and "\n" not in str(refused.value)


async def test_without_access_keys(s3_options: config.StorageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="no access keys: AWS_ACCESS_KEY_ID is not set"):
        await Storage(s3_options.model_copy(update=QUICK)).check()


async def test_a_server_that_is_not_there_is_waited_for(
    s3_options: config.StorageConfig, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(s3_options.model_copy(update={"endpoint": "http://127.0.0.1:1", **QUICK}))
    with caplog.at_level(logging.WARNING):
        await storage.check()
    assert "storage not usable yet" in caplog.text
    reason = rf"^storage: {s3_options.url} at http://127.0.0.1:1: cannot connect \(storage.endpoint\)$"
    calls = [
        storage.ping(),
        storage.put("a", b""),
        storage.stat("a"),
        storage.get("a"),
        storage.list("a"),
        storage.delete("a"),
        storage.delete_prefix("a"),
        read(storage, "a", 0, 10),
    ]
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert type(error) is OSError
        assert re.search(reason, str(error))


async def test_without_conditional_put(s3_options: config.StorageConfig) -> None:
    storage = Storage(s3_options.model_copy(update={"conditional_put": False}))
    await storage.put("a", b"first")
    with pytest.raises(FileExistsError, match="storage already holds 'a'"):
        await storage.put("a", b"second")
    assert await storage.get("a") == b"first"


async def test_prefixes_keep_storages_apart(s3_server: S3Server, s3_options: config.StorageConfig) -> None:
    one, other = Storage(s3_options), Storage(s3_options.model_copy(update={"url": f"s3://{s3_options.bucket}/other"}))
    await one.put("videos/a", b"one")
    assert await other.list("videos") == []
    await other.put("videos/a", b"other")
    assert await one.delete_prefix("videos") == 1
    assert await other.get("videos/a") == b"other"


# Presigned URLs.


async def test_links(s3_storage: Storage) -> None:
    await s3_storage.put("videos/v/1/video.mp4", LARGE, "v.mp4")
    await s3_storage.put("videos/v/1/thumbnail.jpg", b"\xff\xd8", "v-thumbnail.jpg")
    url = await s3_storage.link("videos/v/1/video.mp4")
    assert url is not None and SECRET_KEY not in url.replace(ACCESS_KEY, "")
    async with httpx.AsyncClient() as http:
        answer = await http.get(url)
        assert (answer.status_code, answer.content) == (200, LARGE)
        assert answer.headers["content-type"] == "video/mp4"
        assert answer.headers["content-disposition"] == 'inline; filename="v.mp4"'
        assert answer.headers["etag"] == (await s3_storage.stat("videos/v/1/video.mp4")).etag
        part = await http.get(url, headers={"range": f"bytes={PART_BYTES - 5}-{PART_BYTES + 4}"})
        assert (part.status_code, part.content) == (206, LARGE[PART_BYTES - 5 : PART_BYTES + 5])
        thumbnail = await http.get(str(await s3_storage.link("videos/v/1/thumbnail.jpg")))
        assert thumbnail.headers["content-type"] == "image/jpeg"
        head = await http.head(str(await s3_storage.link("videos/v/1/video.mp4", "HEAD")))
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(LARGE)))
        # Requests that it was not signed for.
        assert (await http.head(url)).status_code == 403
        assert (await http.delete(url)).status_code == 403
        assert (await http.put(url, content=b"x")).status_code == 403
        assert (await http.get(url.replace("video.mp4", "thumbnail.jpg"))).status_code == 403
        assert (await http.get(url.replace("X-Amz-Expires=900", "X-Amz-Expires=9000"))).status_code == 403
        assert (await http.get(url[:-1] + ("0" if url[-1] != "0" else "1"))).status_code == 403
        assert (await http.get(url.partition("?")[0])).is_client_error


async def test_links_expire(s3_options: config.StorageConfig) -> None:
    storage = Storage(s3_options.model_copy(update={"presign_s": 2}))
    await storage.put("a", b"x")
    url = str(await storage.link("a"))
    async with httpx.AsyncClient() as http:
        assert (await http.get(url)).status_code == 200

        async def expired() -> httpx.Response | None:
            answer = await http.get(url)
            return answer if answer.status_code != 200 else None

        answer = await until(expired)
        assert answer.status_code == 403 and "expired" in answer.text


async def test_links_where_clients_reach_the_server_elsewhere(s3_options: config.StorageConfig) -> None:
    public = s3_options.endpoint.replace("127.0.0.1", "localhost")
    storage = Storage(s3_options.model_copy(update={"public_endpoint": public}))
    await storage.put("a", b"x")
    url = str(await storage.link("a"))
    assert url.startswith(public + "/")
    async with httpx.AsyncClient() as http:
        assert (await http.get(url)).content == b"x"
    assert await Storage(s3_options.model_copy(update={"proxy": True})).link("a") is None


# Writers and servers that die.

PUT = """
import asyncio, sys
from serve_app.config import StorageConfig as Options
from serve_app.storage import Storage
asyncio.run(Storage(Options.model_validate_json(sys.argv[1])).put("videos/a/1/video.mp4", b"x" * 200_000_000))
"""


@pytest.fixture
def killed_writer(s3_server: S3Server, s3_options: config.StorageConfig) -> None:
    """A process that was killed amid a `put` of videos/a/1/video.mp4, when parts of it had arrived."""
    before = s3_server.stored_files()
    writer = subprocess.Popen([sys.executable, "-c", PUT, s3_options.model_dump_json()])
    try:
        while s3_server.stored_files() < before + 3:
            assert writer.poll() is None, "it ended before it could be killed"
    finally:
        writer.kill()
        assert writer.wait() == -signal.SIGKILL


@pytest.mark.usefixtures("killed_writer")
async def test_a_writer_that_is_killed_leaves_nothing_to_see(s3_storage: Storage) -> None:
    key = "videos/a/1/video.mp4"
    assert await s3_storage.list("videos") == []
    with pytest.raises(FileNotFoundError):
        await s3_storage.stat(key)
    async with httpx.AsyncClient() as http:
        assert (await http.get(str(await s3_storage.link(key)))).status_code == 404
    await s3_storage.put(key, b"second")
    assert await s3_storage.get(key) == b"second"
    assert await s3_storage.delete_prefix("videos/a") == 1


async def test_an_answer_that_is_lost(s3_server: S3Server, s3_options: config.StorageConfig) -> None:
    async with Relay(s3_server.port) as relay:
        storage = Storage(s3_options.model_copy(update={"endpoint": relay.endpoint}))
        for key, data, request in (
            ("small", b"x", b"PUT "),
            ("large", MEDIUM, b"PUT "),
            ("completed", MEDIUM, b"<CompleteMultipartUpload"),
        ):
            relay.lose_answer_to = request
            await storage.put(key, data)
            assert relay.lose_answer_to is None
            assert await storage.get(key) == data
            with pytest.raises(FileExistsError):
                await storage.put(key, b"another")
        for request, get in ((b"GET ", storage.get("large")), (b"HEAD ", storage.get("large"))):
            relay.lose_answer_to = request
            assert await get == MEDIUM
            assert relay.lose_answer_to is None


async def test_a_server_that_restarts_amid_an_upload(fragile: S3Server, tmp_path: Path) -> None:
    storage = Storage(fragile.options(fragile.make_bucket(), retry_s=60))
    file = tmp_path / "video.mp4"
    file.write_bytes(LARGE)
    before = fragile.stored_files()
    writing = asyncio.create_task(storage.put("videos/a", file))
    await until(lambda: asyncio.to_thread(lambda: fragile.stored_files() > before))
    await asyncio.to_thread(fragile.stop)
    assert not writing.done(), "it ended before the server was stopped"
    await asyncio.to_thread(fragile.start)
    await writing
    assert await storage.get("videos/a") == LARGE


async def test_a_server_that_stops_amid_an_upload(fragile: S3Server) -> None:
    bucket = fragile.make_bucket()
    storage, patient = Storage(fragile.options(bucket, **QUICK)), Storage(fragile.options(bucket))
    before = fragile.stored_files()
    writing = asyncio.create_task(storage.put("videos/a", LARGE))
    await until(lambda: asyncio.to_thread(lambda: fragile.stored_files() > before))
    await asyncio.to_thread(fragile.stop)
    async with asyncio.timeout(30):
        with pytest.raises(OSError, match=r"^storage: s3://[^\n]*$"):
            await writing
    with pytest.raises(OSError, match=r"cannot connect \(storage.endpoint\)$"):
        await storage.put("videos/b", b"x")
    await asyncio.to_thread(fragile.start)
    await storage.put("videos/a", b"second")
    assert await patient.list("videos") == ["videos/a"]
    assert await patient.get("videos/a") == b"second"


async def test_a_server_that_hangs(fragile: S3Server) -> None:
    bucket = fragile.make_bucket()
    storage, patient = Storage(fragile.options(bucket, **QUICK)), Storage(fragile.options(bucket))
    await patient.put("videos/a", LARGE)
    stream = storage.stream("videos/a")
    got = [await anext(stream)]
    fragile.freeze()
    calls = [
        storage.ping(),
        storage.put("videos/b", b"x"),
        storage.put("videos/c", LARGE),
        storage.get("videos/a"),
        storage.stat("videos/a"),
        storage.list("videos"),
        storage.delete("videos/none"),
        storage.delete_prefix("videos"),
        _rest(stream, got),
    ]
    async with asyncio.timeout(30):
        errors = await asyncio.gather(*calls, return_exceptions=True)
    for error in errors:
        assert type(error) is OSError, errors
        assert str(error).endswith(": no answer within 3 s (storage.endpoint, storage.timeout_s)")
    assert b"".join(got) == LARGE[:PART_BYTES]
    fragile.thaw()
    assert await patient.get("videos/a") == LARGE


async def test_a_server_that_restarts_amid_a_download(fragile: S3Server) -> None:
    storage = Storage(fragile.options(fragile.make_bucket(), retry_s=60))
    await storage.put("videos/a", LARGE)
    stream = storage.stream("videos/a")
    got = [await anext(stream)]
    await asyncio.to_thread(fragile.stop)
    rest = asyncio.create_task(_rest(stream, got))
    await asyncio.to_thread(fragile.start)
    await rest
    assert b"".join(got) == LARGE


async def _rest(stream: Any, got: list[bytes]) -> None:
    async for chunk in stream:
        got.append(chunk)
