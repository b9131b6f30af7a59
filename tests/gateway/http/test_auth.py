"""Keys, scopes and limits over HTTP, by the real openai SDK and by the command line."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from typer.testing import CliRunner, Result

from serve_app.cli import cli
from serve_app.config import AuthConfig
from serve_app.errors import ConfigError
from serve_app.gateway.http.rate import Buckets
from tests.cli.test_generate import generate
from tests.gateway.conftest import Server
from tests.support.fakes import until

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def auth() -> AuthConfig:
    return AuthConfig(mode="keys")


async def test_without_a_key(server: Server) -> None:
    unknown = "video_" + "0" * 38
    _, good = await server.key()
    gone_id, gone = await server.key()
    await server.store.keys.revoke(gone_id)
    wrong = [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer none"},
        {"authorization": good["authorization"].replace("Bearer", "Basic")},
        {"authorization": good["authorization"] + "0"},
        gone,
    ]
    schema = (await server.http.get("/openapi.json")).json()
    asked = 0
    for path, methods in schema["paths"].items():
        if not path.startswith("/v1/"):
            continue
        for method in methods:
            for headers in wrong:
                answer = await server.http.request(method, path.replace("{video_id}", unknown), headers=headers)
                assert answer.status_code == 401, (method, path, headers, answer.text)
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.json()["error"]["type"] == "authentication_error"
                assert (answer.headers["www-authenticate"], answer.headers["x-should-retry"]) == ("Bearer", "false")
                asked += 1
            assert "401" in schema["paths"][path][method]["responses"], (method, path)
    assert asked > 80
    for path in ("/", "/healthz", "/readyz", "/docs"):
        assert (await server.http.get(path)).status_code == 200
    assert (await server.http.get("/v1/videos", headers=good)).status_code == 200
    assert (await server.http.head(f"/v1/videos/{unknown}/content")).status_code == 401


async def test_scopes(server: Server) -> None:
    _, both = await server.key()
    _, reads = await server.key("read")
    _, creates = await server.key("create")
    video = await server.create(both)
    for method, path, lacks in (
        ("POST", "/v1/videos", reads),
        ("POST", f"/v1/videos/{video['id']}/remix", reads),
        ("POST", f"/v1/videos/{video['id']}/cancel", reads),
        ("DELETE", f"/v1/videos/{video['id']}", reads),
        ("GET", "/v1/videos", creates),
        ("GET", f"/v1/videos/{video['id']}", creates),
        ("GET", f"/v1/videos/{video['id']}/content", creates),
        ("HEAD", f"/v1/videos/{video['id']}/content", creates),
        ("GET", f"/v1/videos/{video['id']}/events", creates),
    ):
        answer = await server.http.request(method, path, headers=lacks)
        assert answer.status_code == 403, (method, path)
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "missing_scope"
    for headers in (reads, creates):
        assert (await server.http.get("/v1/models", headers=headers)).status_code == 200
    assert (await server.create(creates))["status"] == "queued"


async def test_what_another_owns_is_not_there(server: Server, held: asyncio.Event) -> None:
    my_id, mine = await server.key()
    their_id, theirs = await server.key()
    _, admin = await server.key("create", "read", "admin")
    video = await server.create(theirs)
    assert (video["owner"], (await server.create(mine))["owner"]) == (their_id, my_id)
    path = f"/v1/videos/{video['id']}"
    for method, what in (
        ("GET", ""),
        ("GET", "/content"),
        ("HEAD", "/content"),
        ("GET", "/events"),
        ("POST", "/cancel"),
        ("POST", "/remix"),
        ("DELETE", ""),
    ):
        answer = await server.http.request(method, path + what, headers=mine, json={"prompt": "x"})
        assert answer.status_code == 404, (method, what)
        if method == "HEAD":
            continue
        # The error is the same as for a video that never existed.
        nothing = await server.http.request(
            method, f"/v1/videos/{'video_' + '0' * 38}{what}", headers=mine, json={"prompt": "x"}
        )
        assert answer.text.replace(video["id"], "ID") == nothing.text.replace("video_" + "0" * 38, "ID")
    for headers, owners in ((mine, {my_id}), (theirs, {their_id}), (admin, {my_id, their_id})):
        page = (await server.http.get("/v1/videos", headers=headers)).json()
        assert {entry["owner"] for entry in page["data"]} == owners
    assert (await server.http.get(path, headers=theirs)).json()["status"] in ("queued", "in_progress")
    assert (await server.http.get(path, headers=admin)).status_code == 200
    remix = await server.http.post(f"{path}/remix", headers=admin, json={"prompt": "x"})
    assert remix.json()["owner"] not in (my_id, their_id)
    assert (await server.http.post(f"{path}/cancel", headers=admin)).status_code == 200
    assert (await server.http.delete(path, headers=theirs)).status_code == 200


async def test_limits(server: Server, held: asyncio.Event) -> None:
    key_id, headers = await server.key(running_jobs=1, queued_jobs=1)
    first = await server.create(headers)

    async def running() -> bool:
        return [job.id for job in server.pipeline.jobs] == [first["id"]]

    await until(running)
    await server.create(headers)  # waits, though the dispatcher has room
    answer = await server.http.post("/v1/videos", json={"prompt": "x"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queued_jobs")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert (answer.headers["x-should-retry"], answer.headers["retry-after"]) == ("true", "5")
    assert len(server.pipeline.jobs) == 1
    await server.store.keys.limit(key_id, {"gpu_seconds_per_day": 1.5, "queued_jobs": None})
    held.set()
    for video in (await server.http.get("/v1/videos", headers=headers)).json()["data"]:

        async def ended(path: str = f"/v1/videos/{video['id']}") -> bool:
            return bool((await server.http.get(path, headers=headers)).json()["status"] == "completed")

        await until(ended)
    answer = await server.http.post("/v1/videos", json={"prompt": "x"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "gpu_seconds")
    # The limit ends tomorrow, so clients should not retry by themselves.
    assert answer.headers["x-should-retry"] == "false" and 86_000 < int(answer.headers["retry-after"]) <= 86_400


async def test_requests_per_minute(server: Server) -> None:
    _, headers = await server.key(requests_per_minute=3)
    _, other = await server.key()
    answers = [await server.http.get("/v1/videos", headers=headers) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[3].json()["error"]["code"] == "requests_per_minute"
    assert 1 <= int(answers[3].headers["retry-after"]) <= 20 and answers[3].headers["x-should-retry"] == "true"
    assert (await server.http.get("/v1/videos", headers=other)).status_code == 200


def test_buckets() -> None:
    now = 1000.0
    buckets = Buckets(replicas=2, clock=lambda: now)
    assert [buckets.take_token("a", 4) for _ in range(3)] == [0, 0, 30]
    now += 29
    assert 0 < buckets.take_token("a", 4) <= 1
    now += 1
    assert buckets.take_token("a", 4) == 0 and buckets.take_token("a", 4) == 30
    now += 3600  # never more than a minute's worth
    assert [buckets.take_token("a", 4) == 0 for _ in range(3)] == [True, True, False]
    # A share below one request per minute still lets one through now and then.
    assert (buckets.take_token("b", 1), buckets.take_token("b", 1)) == (0, 120)
    now += 120
    assert buckets.take_token("b", 1) == 0


async def test_the_openai_sdk(client: openai.AsyncOpenAI, server: Server) -> None:
    def having(headers: dict[str, str]) -> openai.AsyncOpenAI:
        return client.with_options(api_key=headers["authorization"].removeprefix("Bearer "), max_retries=0)

    with pytest.raises(openai.AuthenticationError) as wrong:
        await client.videos.create(prompt="a cat")
    assert wrong.value.code == "invalid_api_key"
    _, key = await server.key()
    _, other = await server.key()
    _, reads = await server.key("read")
    _, slow = await server.key(requests_per_minute=1)
    video = await having(key).videos.create_and_poll(prompt="a cat")
    assert video.status == "completed"
    assert len(await (await having(key).videos.download_content(video.id)).aread()) == 200_192
    with pytest.raises(openai.PermissionDeniedError):
        await having(reads).videos.create(prompt="a cat")
    for call in (having(other).videos.retrieve, having(other).videos.delete, having(other).videos.download_content):
        with pytest.raises(openai.NotFoundError):
            await call(video.id)
    with pytest.raises(openai.NotFoundError):
        await having(other).videos.remix(video.id, prompt="a dog")
    assert [entry.id async for entry in having(other).videos.list()] == []
    assert (await having(slow).models.list()).data[0].id
    with pytest.raises(openai.RateLimitError):
        await having(slow).models.list()


async def test_the_command_line(client: openai.AsyncOpenAI, server: Server, tmp_path: Path) -> None:
    url, out = str(client.base_url).removesuffix("/v1/"), tmp_path / "out.mp4"
    _, headers = await server.key()
    status, said = await generate(url, out, "--key", headers["authorization"].removeprefix("Bearer "))
    assert status == 0 and out.stat().st_size == 200_192, said
    status, said = await generate(url, out)
    assert (status, said.count("\n")) == (1, 1) and "An API key is needed" in said, said


def test_keys_on_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    args = {"home": str(tmp_path), "auth": {"mode": "keys"}}
    config.write_text(yaml.safe_dump({"applications": [{"name": "gateway", "args": args}]}))

    def keys(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["keys", *arguments, "--config", str(config)])

    made = keys("create", "alice [a&b]", "--queued-jobs", "3", "--scopes", "read,create")
    text = made.stdout.strip()
    assert made.exit_code == 0 and text.startswith("wan_") and "shown only now" in made.stderr, made.stderr
    assert "nobody asks" not in made.stderr
    open_config = tmp_path / "open.yaml"
    open_args = {"home": str(tmp_path)}
    open_config.write_text(yaml.safe_dump({"applications": [{"name": "gateway", "args": open_args}]}))
    idle = CliRunner().invoke(cli, ["keys", "create", "bob", "--config", str(open_config)])
    assert idle.stdout.startswith("wan_") and idle.stdout.count("\n") == 1
    assert f"nobody asks for it: auth.mode has value 'none' in {open_config}" in idle.stderr
    key_id = text.split("_")[1]
    changed = keys("limit", key_id, "--queued-jobs", "0", "--gpu-seconds-per-day", "3600.5")
    assert changed.exit_code == 0 and "queued_jobs none, gpu_seconds_per_day 3600.5" in changed.stdout
    listed = keys("list").stdout
    assert key_id in listed and "create,read" in listed and "[gpu_seconds_per_day 3600.5]  alice [a&b]" in listed
    assert text.rpartition("_")[2] not in listed
    assert keys("revoke", key_id).exit_code == 0 and "revoked" in keys("list").stdout
    for arguments, said in (
        (("revoke", "nobody"), "ID has value 'nobody'"),
        (("limit", "nobody", "--queued-jobs", "1"), "ID has value 'nobody'"),
        (("limit", key_id), "expected one of --requests-per-minute"),
        (("create", "bob", "--scopes", "write"), "--scopes has value 'write'"),
        (("create", "bob", "--scopes", "admin"), "--scopes has value 'admin'"),
    ):
        error = keys(*arguments).exception
        assert isinstance(error, ConfigError) and said in str(error) and "\n" not in str(error), arguments


class TestNobodyAsks:
    """Calls to a server with `auth: {mode: none}`."""

    @pytest.fixture
    def auth(self) -> AuthConfig:
        return AuthConfig()

    async def test_answers_its_own_machine_only(self, server: Server) -> None:
        for address, status in (
            ("127.0.0.1", 200),
            ("127.1.2.3", 200),
            ("[::1]", 200),
            ("10.0.0.1", 403),
            ("[2001:db8::1]", 403),
            ("example.org", 403),
        ):
            answer = await server.http.get(f"http://{address}/v1/videos", headers={"host": "localhost"})
            assert answer.status_code == status, address
        assert answer.json()["error"]["code"] == "not_open" and "auth.open" in answer.json()["error"]["message"]

    async def test_on_a_real_address(self, client: openai.AsyncOpenAI) -> None:
        """The address of the connection decides, which no header can change."""
        async with httpx.AsyncClient() as http:
            for headers in ({}, {"host": "localhost"}, {"x-forwarded-host": "example.org"}):
                assert (await http.get(f"{client.base_url}videos", headers=headers)).status_code == 200


class TestOpen:
    """Calls to a server with `auth: {mode: none, open: true}`."""

    @pytest.fixture
    def auth(self) -> AuthConfig:
        return AuthConfig(open=True)

    async def test_answers_everybody(self, server: Server) -> None:
        assert (await server.http.get("http://10.0.0.1/v1/videos")).status_code == 200
