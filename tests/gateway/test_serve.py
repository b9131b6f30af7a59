"""Gateway and dispatcher as deployments of a real Ray, in front of a pipeline application without a model."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import openai
import pytest

import serve_app
from serve_app.errors import InvalidRequest, JobFailed, Unavailable
from serve_app.events import Event
from serve_app.job_spec import JobSpec
from tests.stages.conftest import until
from tests.support.plain_http import http

serve = pytest.importorskip("ray.serve")

PORT = 8127
STREAMS = 4


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=100)
class Pipeline:
    """A pipeline that does what the prompt says."""

    def __init__(self, storage_url: str) -> None:
        from serve_app.storage import Storage
        from tests.support.fakes import FakePipeline

        self._storage = Storage(storage_url)
        self._make = FakePipeline

    async def generate(self, job: JobSpec, caller: Any = None) -> AsyncIterator[Event]:
        import os

        prompt = job.params.prompt
        errors: list[Exception] = []
        if prompt == "refuse":
            errors = [JobFailed("too_large", "It cannot fit.")]
        elif prompt == "lose a rank" and job.attempt == 1:
            errors = [JobFailed("rank_lost", "A rank was lost.", retryable=True)]
        elif prompt == "crash":
            errors = [ZeroDivisionError("in a stage")]
        elif prompt == "die" and job.attempt == 1:
            os._exit(1)
        gate = asyncio.Event() if prompt == "wait" else None
        async for event in self._make(self._storage, step_s=0.05, errors=errors, gate=gate)(job):
            yield event


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def url(ray_cluster: str, home: Path) -> Iterator[str]:
    from ray.serve.context import _get_global_client

    from serve_app.config import Config, Defaults, WebhooksConfig
    from serve_app.config import DispatcherConfig as Options
    from serve_app.config import GatewayConfig as GatewayOptions
    from serve_app.dispatch.deployment import DispatcherDeployment
    from serve_app.gateway.ingress import Gateway

    config = Config(
        home=str(home),
        defaults=Defaults(width=64, height=64, num_frames=9, num_inference_steps=4),
        gateway=GatewayOptions(max_ongoing_requests=2 * STREAMS),
        dispatcher=Options(pipeline="fake", poll_s=0.2, retry_s=0.1, late_outputs_s=0.5),
        webhooks=WebhooksConfig(allow_http=True, allow_networks=(ip_network("127.0.0.0/8"),)),
    )
    small = {"num_cpus": 0.1}
    serve.start(http_options={"host": "0.0.0.0", "port": PORT})
    dispatcher = DispatcherDeployment.options(ray_actor_options=small).bind(config)
    serve.run(Gateway.options(ray_actor_options=small).bind(config, dispatcher), name="gateway", route_prefix="/")
    # The gateway starts before there is a pipeline: it is not ready, and jobs wait without losing an attempt.
    port = _get_global_client().http_config.port  # another, if Serve ran already
    url = f"http://127.0.0.1:{port}"
    answer = http.get(f"{url}/readyz")
    assert answer.status_code == 503 and "'fake' is not deployed" in answer.text
    early = http.post(f"{url}/v1/videos", json={"prompt": "early"}).json()
    time.sleep(1)
    serve.run(Pipeline.bind(config.storage_url), name="fake", route_prefix=None)
    assert wait(url, early["id"])["status"] == "completed"
    yield url
    for application in ("gateway", "fake"):
        serve.delete(application)


def wait(url: str, video_id: str, within_s: float = 120) -> dict[str, Any]:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        video = dict(http.get(f"{url}/v1/videos/{video_id}").json())
        if video["status"] in ("completed", "failed"):
            return video
        time.sleep(0.05)
    raise AssertionError(f"{video_id} did not end: {video}")


def make(url: str, prompt: str) -> dict[str, Any]:
    return wait(url, http.post(f"{url}/v1/videos", json={"prompt": prompt}).json()["id"])


def test_http(url: str) -> None:
    assert http.get(f"{url}/readyz").status_code == 200
    answer = http.post(f"{url}/v1/videos", json={"prompt": "一只猫"}, headers={"x-request-id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]
    video = wait(url, answer.json()["id"])
    assert (video["status"], video["attempts"], video["prompt"]) == ("completed", 1, "一只猫")
    content = f"{url}/v1/videos/{video['id']}/content"
    assert len(http.get(content).content) == 200_192
    assert http.get(content, headers={"range": "bytes=1-3"}).content == b"\x01\x02\x03"
    head = http.head(content)
    assert (head.status_code, head.headers["content-length"]) == (200, "200192")
    assert http.get(f"{url}/").status_code == 200 and http.get(f"{url}/docs").status_code == 200
    assert http.get(f"{url}/nothing").json()["error"]["code"] == "not_found"
    for path in ("/healthz", "/", "/v1/models", f"/v1/videos/{video['id']}", f"/v1/videos/{video['id']}/events"):
        head = http.head(url + path)
        assert (head.status_code, head.content) == (200, b""), path
    answer = http.request("PATCH", f"{url}/v1/videos")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")
    assert http.get(f"{url}/v1/videos?after=%ff").status_code == 400
    for host, status in (("evil.example", 403), ("localhost:1", 200)):
        assert http.get(f"{url}/v1/videos", headers={"host": host}).status_code == status
    foreign = http.post(f"{url}/v1/videos", json={"prompt": "x"}, headers={"origin": "https://evil.example"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "foreign_origin")


def test_the_logs_of_a_job_are_found(url: str) -> None:
    from serve_app.cli.ray_logs import job_lines, session_folders

    video_id = make(url, "a cat")["id"]

    def said() -> bool:
        lines = job_lines(session_folders(), video_id)
        return all(
            any(f'"message": "{what}"' in line for line in lines) for what in ("created", "claimed", "completed")
        )

    until(said)


def test_a_webhook_is_called_by_the_dispatchers_process(url: str) -> None:
    told: queue.Queue[tuple[bytes, dict[str, str]]] = queue.Queue()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.put((self.rfile.read(int(self.headers["content-length"])), dict(self.headers.items())))
            self.send_response(204)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        body = {"url": f"http://127.0.0.1:{server.server_port}/", "name": "x", "event_types": ["video.completed"]}
        endpoint = http.post(f"{url}/v1/webhook_endpoints", json=body).json()
        video = make(url, "a cat")
        content, headers = told.get(timeout=120)
        server.shutdown()
    event = openai.OpenAI(api_key="none").webhooks.unwrap(content, headers, secret=endpoint["signing_secret"])
    assert (event.type, event.data.id) == ("video.completed", video["id"])
    answer = http.delete(f"{url}/v1/webhook_endpoints/{endpoint['id']}")
    assert answer.status_code == 200


def test_other_machines_are_not_answered_without_keys(url: str) -> None:
    """The gateway refuses calls from other machines even if Serve accepts them: it sees the connection's address."""
    import ray
    from ray.serve.context import _get_global_client

    address, host = ray.util.get_node_ip_address(), _get_global_client().http_config.host
    if address.startswith("127.") or host != "0.0.0.0":
        pytest.skip(f"this host's address is {address} and Serve, started by others, listens on {host}")
    other = url.replace("127.0.0.1", address)
    for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/v1/models")):
        answer = http.request(method, other + path, headers={"host": "127.0.0.1"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_open")
    assert http.get(f"{url}/v1/videos").status_code == 200


def test_body_limit_behind_the_proxy(url: str) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(64):
            yield b"x" * 65536

    for content in (chunks(), b"x" * 4_000_000):
        answer = http.post(f"{url}/v1/videos", content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_events_behind_the_proxy(url: str) -> None:
    """Events come while a video runs, not all at its end; and a client that leaves frees its place."""
    video = http.post(f"{url}/v1/videos", json={"prompt": "wait"}).json()
    events = f"{url}/v1/videos/{video['id']}/events"
    cancelled, names = False, []
    with http.stream("GET", events, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: "))
            if '"stage":"denoise"' in line and not cancelled:
                cancelled = http.post(f"{url}/v1/videos/{video['id']}/cancel").status_code == 200
    assert "in_progress" in names and names[-1] == "failed"
    video = http.post(f"{url}/v1/videos", json={"prompt": "wait"}).json()
    events = f"{url}/v1/videos/{video['id']}/events"
    for _ in range(3 * STREAMS):
        end = time.monotonic() + 120
        while True:
            with http.stream("GET", events, timeout=30) as answer:
                if answer.status_code == 200:
                    assert next(answer.iter_lines()) == "retry: 2000"
                    break
                assert answer.status_code == 503 and time.monotonic() < end
            time.sleep(0.1)
    assert http.delete(f"{url}/v1/videos/{video['id']}").status_code == 200


def test_failures_cross_the_handle(url: str) -> None:
    video = make(url, "refuse")
    assert video["error"] == {"code": "too_large", "message": "It cannot fit."}
    video = make(url, "lose a rank")
    assert (video["status"], video["attempts"]) == ("completed", 2)
    video = make(url, "crash")
    assert video["error"]["code"] == "internal_error"
    assert video["error"]["message"] == "An internal error ended this video: ZeroDivisionError: in a stage"


def test_a_replica_dies(url: str) -> None:
    video = make(url, "die")
    assert (video["status"], video["attempts"]) == ("completed", 2)


def test_a_deadline_reaches_the_pipeline(url: str) -> None:
    for seconds in (4, 16, 64):  # a busy machine needs the longer ones to begin
        body = {"prompt": "wait", "deadline_s": seconds, "priority": "interactive"}
        video = http.post(f"{url}/v1/videos", json=body).json()
        assert video["priority"] == "interactive"
        assert video["deadline_at"] - video["created_at"] in (seconds, seconds + 1)
        video = wait(url, video["id"])
        assert video["error"]["code"] == "deadline_exceeded"
        if video["stage"] == "denoise":
            break
    assert video["stage"] == "denoise"
    assert make(url, "after")["status"] == "completed"


def test_jobs_wait_for_a_pipeline_that_is_deployed_anew(url: str, home: Path) -> None:
    serve.delete("fake")
    video = http.post(f"{url}/v1/videos", json={"prompt": "patient"}).json()
    end = time.monotonic() + 120
    while not (video["status"] == "queued" and video["attempts"] >= 2):  # put back twice
        assert video["status"] in ("queued", "in_progress") and video["last_error"] is None, video
        assert time.monotonic() < end
        time.sleep(0.05)
        video = http.get(f"{url}/v1/videos/{video['id']}").json()
    serve.run(Pipeline.bind(str(home / "videos")), name="fake", route_prefix=None)
    video = wait(url, video["id"])
    assert (video["status"], video["error"]) == ("completed", None)


def test_cancel_and_delete_reach_the_pipeline(url: str) -> None:
    for action in ("cancel", "delete"):
        video_id = http.post(f"{url}/v1/videos", json={"prompt": "wait"}).json()["id"]
        while http.get(f"{url}/v1/videos/{video_id}").json()["stage"] != "denoise":
            time.sleep(0.05)
        if action == "cancel":
            http.post(f"{url}/v1/videos/{video_id}/cancel")
            assert wait(url, video_id)["error"]["code"] == "cancelled"
        else:
            assert http.delete(f"{url}/v1/videos/{video_id}").status_code == 200
        assert make(url, "after")["status"] == "completed"


def test_a_gateway_that_cannot_start_says_why_in_one_line(url: str, tmp_path: Path) -> None:
    from serve_app.config import Config, StoreConfig
    from serve_app.dispatch.deployment import DispatcherDeployment
    from serve_app.gateway.ingress import Gateway

    config = Config(home=str(tmp_path), store=StoreConfig(url="postgresql://me:secret@127.0.0.1:1/wan"))
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}, "max_constructor_retry_count": 1}
    dispatcher = DispatcherDeployment.options(**options).bind(config)
    try:
        with pytest.raises(RuntimeError):
            serve.run(Gateway.options(**options).bind(config, dispatcher), name="broken", route_prefix="/broken")

        def message() -> str:
            return str(serve.status().applications["broken"].deployments["gateway"].message)

        # An application has failed as soon as one of its deployments has.
        until(lambda: "store.url has value" in message())
        said = [line for line in message().splitlines() if "store.url has value" in line]
        assert len(said) == 1 and "cannot be opened: [Errno 111]" in said[0], message()
        assert "sqlalchemy" not in message() and "secret" not in message()
    finally:
        serve.delete("broken")


def test_handle_calls(url: str) -> None:
    gateway = serve.get_app_handle("gateway")
    stream = gateway.options(stream=True)
    video = gateway.submit.remote({"prompt": "by handle", "seed": 3}).result()
    assert (video["prompt"], video["seed"], video["status"]) == ("by handle", 3, "queued")
    seen = list(stream.watch.remote(video["id"]))
    assert seen[-1]["status"] == "completed" and len(seen) > 1
    content = b"".join(stream.content.remote(video["id"], "video"))
    assert len(content) == 200_192
    assert gateway.get.remote(video["id"]).result()["status"] == "completed"
    assert gateway.cancel.remote(video["id"]).result() is False
    assert gateway.delete.remote(video["id"]).result() is True
    assert gateway.get.remote(video["id"]).result() is None
    with pytest.raises(InvalidRequest) as error:
        gateway.submit.remote({"prompt": "x", "num_frames": 4}).result()
    assert error.value.param == "num_frames"
    with pytest.raises(InvalidRequest):
        list(stream.content.remote(video["id"], "video"))
    with pytest.raises(InvalidRequest):
        list(stream.watch.remote(video["id"]))


def test_the_client_says_how_soon(url: str) -> None:
    client = serve_app.connect()
    video = client.generate(serve_app.VideoRequest(prompt="soon", priority="batch", deadline_s=60))
    assert (video.status, video.info["priority"]) == ("completed", "batch")
    assert video.info["deadline_at"] > video.info["created_at"]
    assert client.submit("later", priority="interactive").info["priority"] == "interactive"
    assert video.info["owner"] is None
    assert serve_app.connect(owner="0123456789abcdef").submit("hers").info["owner"] == "0123456789abcdef"
    with pytest.raises(InvalidRequest, match=r"'priority' has value 'high'"):
        client.submit("never", priority="high")


def test_the_client_raises_the_error_itself(url: str, home: Path) -> None:
    """Calls of all kinds raise our errors, not Ray's wrapper with the frames of another process."""
    client = serve_app.connect()

    async def make() -> None:
        await client.generate_async("never", frames=3)

    async def follow() -> None:
        async for _ in client.stream_async("never", num_frames=4):
            pass

    waits = client.submit("wait")
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: client.submit("never", num_frames=4), InvalidRequest, "'num_frames' is 4, expected 4k+1;"),
        (lambda: client.generate("never", steps=4), InvalidRequest, "did you mean 'num_inference_steps'?"),
        (lambda: list(client.stream("never", size="x")), InvalidRequest, "'size' has value 'x'"),
        (lambda: asyncio.run(make()), InvalidRequest, "did you mean 'num_frames'?"),
        (lambda: asyncio.run(follow()), InvalidRequest, "'num_frames' is 4"),
        (lambda: b"".join(client.content("video_x")), InvalidRequest, "There is no video 'video_x'"),
        (lambda: waits.save(home / "out.mp4"), InvalidRequest, "not completed"),
        (lambda: client.generate("refuse"), JobFailed, "too_large: It cannot fit."),
        (lambda: client.submit("x" * 10_000), InvalidRequest, "'prompt' has 10000 characters"),
    ]
    for call, kind, said in calls:
        with pytest.raises(kind) as error:
            call()
        assert type(error.value) is kind and said in str(error.value) and "\n" not in str(error.value), error.value
    assert not (home / "out.mp4").exists()
    (home / "nothing").write_text("")
    (home / "videos").rename(home / "videos.away")
    (home / "nothing").rename(home / "videos")  # a file: a run that ends meanwhile would make the folder anew
    try:
        with pytest.raises(Unavailable, match="No videos are accepted at the moment") as away:
            until(lambda: client.submit("never") is None)
        assert type(away.value) is Unavailable
    finally:
        (home / "videos").unlink()
        (home / "videos.away").rename(home / "videos")
    assert client.cancel(waits.id)


def test_stopping_hands_jobs_back(url: str, home: Path) -> None:
    """A dispatcher that Serve stops releases its jobs at once, long before their leases run out."""
    from serve_app.jobs.store import JobStore

    video_id = http.post(f"{url}/v1/videos", json={"prompt": "wait"}).json()["id"]
    while http.get(f"{url}/v1/videos/{video_id}").json()["stage"] != "denoise":
        time.sleep(0.05)
    serve.delete("gateway")

    async def row() -> Any:
        store = JobStore(f"sqlite:///{home}/jobs.db")
        await store.start()
        job = await store.get(video_id)
        await store.close()
        return job

    job = asyncio.run(row())
    assert (job.status, job.failures, job.lease_owner) == ("queued", 0, None)
