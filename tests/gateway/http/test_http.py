from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi.openapi.utils import get_openapi

from serve_app import __version__
from serve_app.gateway.app import model_card
from tests.gateway.conftest import Server

ENVELOPE = {"message", "type", "param", "code"}


async def test_errors_of_the_frame(server: Server) -> None:
    unknown = "video_" + "0" * 38
    for method, path, status, code in (
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/videos/", 404, "not_found"),
        ("GET", f"/v1/videos/{unknown}", 404, "not_found"),
        ("GET", "/v1/videos/%00", 404, "not_found"),
        ("GET", "/v1/videos/..%2f..%2fetc", 404, "not_found"),
        ("GET", f"/v1/videos/{unknown}/content", 404, "not_found"),
        ("DELETE", f"/v1/videos/{unknown}", 404, "not_found"),
        ("POST", f"/v1/videos/{unknown}/cancel", 404, "not_found"),
        ("POST", f"/v1/videos/{unknown}/remix", 404, "not_found"),
        ("PUT", "/v1/videos", 405, "method_not_allowed"),
        ("PATCH", f"/v1/videos/{unknown}", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/videos", 405, "method_not_allowed"),
        ("HEAD", "/v1/videos/edits", 404, ""),
        ("HEAD", f"/v1/videos/{unknown}", 404, ""),
        ("HEAD", f"/v1/videos/{unknown}/cancel", 405, ""),
    ):
        answer = await server.http.request(method, path, json={"prompt": "x"})
        assert answer.status_code == status, (method, path, answer.text)
        assert status != 405 or answer.headers["allow"]
        if method == "HEAD":
            assert answer.content == b"" and answer.headers["content-type"] == "application/json"
            continue
        error = answer.json()["error"]
        assert set(error) == ENVELOPE and error["code"] == code and error["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["x-request-id"]


async def test_request_ids(server: Server) -> None:
    ids = {(await server.http.get("/healthz")).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    answer = await server.http.get("/healthz", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    answer = await server.http.get("/healthz", headers={"x-request-id": "not; mine"})
    assert answer.headers["x-request-id"] not in ("not; mine", "")


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
async def test_body_limit(server: Server, kind: str, chunked: bool) -> None:
    read = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal read
        yield b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
        for _ in range(1000):
            read += 1000
            yield b"x" * 1000

    content: Any = chunks() if chunked else b"x" * 1_000_000
    answer = await server.http.post("/v1/videos", content=content, headers={"content-type": kind})
    assert answer.status_code == 413
    assert answer.json()["error"] == {
        "message": "The body is too large, expected at most 50000 bytes.",
        "type": "invalid_request_error",
        "param": None,
        "code": "body_too_large",
    }
    assert answer.headers["x-should-retry"] == "false" and answer.headers["x-request-id"]


async def test_our_own_mistakes(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(*_: Any) -> Any:
        raise KeyError("a secret")

    server.store.get = broken  # type: ignore[assignment, method-assign]
    answer = await server.http.get("/v1/videos/video_1", headers={"x-request-id": "mine-2"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error" and "secret" not in answer.text
    assert answer.headers["x-request-id"] == "mine-2" and answer.headers["x-should-retry"] == "false"
    assert any(getattr(record, "request", None) == "mine-2" and record.exc_info for record in caplog.records)


async def test_health(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await server.http.get("/healthz")).json() == {"status": "ok"}
    assert (await server.http.get("/readyz")).status_code == 200
    server.reason = "The pipeline application 'wan' is UNHEALTHY."
    assert (await server.http.get("/readyz")).json()["status"] == "ready"  # looked up at most once a second
    monkeypatch.setattr("serve_app.gateway.readiness._HOLDS_S", 0)
    monkeypatch.setattr("serve_app.gateway.videos.admission._HOLDS_S", 0)
    degraded = {"status": "degraded", "reason": server.reason}
    # Jobs are accepted nevertheless, during a pause as well.
    assert await state(server) == (200, degraded)
    assert (await server.create())["status"] == "queued"
    await server.store.pause()
    assert await state(server) == (200, {**degraded, "reason": f"{server.reason} An operator has paused the queue."})
    await server.store.resume()
    server.never = True  # as where it is deployed anew; it was ready before
    assert await state(server) == (200, degraded)
    server.never, server.reason = False, None
    moved = server.storage.folder.rename(server.storage.folder.with_name("moved"))
    status, said = await state(server)
    assert status == 503 and said["error"]["message"].startswith("No videos are accepted at the moment: "), said
    moved.rename(server.storage.folder)
    assert await state(server) == (200, {"status": "ready", "reason": None})
    await server.store.close()
    answer = await server.http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "The job store does not answer: RuntimeError."


async def state(server: Server) -> tuple[int, dict[str, Any]]:
    answer = await server.http.get("/readyz")
    return answer.status_code, dict(answer.json())


async def test_a_server_that_was_never_ready_is_not(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.gateway.readiness._HOLDS_S", 0)
    server.reason, server.never = "The pipeline application 'wan' is DEPLOYING.", True
    answer = await server.http.get("/readyz")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, server.reason)
    assert answer.headers["x-should-retry"] == "true"
    server.reason, server.never = None, False
    assert await state(server) == (200, {"status": "ready", "reason": None})


async def test_models(server: Server) -> None:
    models = (await server.http.get("/v1/models")).json()
    (model,) = models["data"]
    assert (models["object"], model["object"], model["id"]) == ("list", "model", server.config.model.name)
    assert model["limits"]["num_frames"] == 81 and model["defaults"]["num_inference_steps"] == 4
    assert (await server.http.get(f"/v1/models/{model['id']}")).json() == model
    assert (await server.http.get("/v1/models/sora-2")).status_code == 404
    assert "circles, squares, triangles and stars" in model["note"]
    other = server.config.model_copy(update={"model": server.config.model.model_copy(update={"path": "/models/a14b"})})
    assert model_card(other).note is None


async def test_page(server: Server) -> None:
    answer = await server.http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    for outside in ("http://", "https://", "//cdn", "@import"):
        assert outside not in answer.text


async def test_openapi(server: Server) -> None:
    schema = (await server.http.get("/openapi.json")).json()
    assert schema == json.loads(json.dumps(get_openapi(title="serve_app", version=__version__, routes=[]))) | schema
    create = schema["paths"]["/v1/videos"]["post"]
    assert set(create["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert "num_frames" in create["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"200", "400", "413", "429"} <= set(create["responses"])
    assert "queue_position" in schema["components"]["schemas"]["Video"]["properties"]
    assert set(schema["paths"]) >= {"/v1/videos/{video_id}/content", "/v1/models", "/readyz", "/healthz"}


async def test_the_description_comes_without_a_network(server: Server) -> None:
    page = await server.http.get("/docs")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "://" not in page.text and '"//' not in page.text and page.text.count("data:,") == 1
    for name, kind, begins in (
        ("swagger-ui-bundle.js", "text/javascript", "/*! For license information"),
        ("swagger-ui.css", "text/css", ".swagger-ui"),
    ):
        assert f'"docs/{name}"' in page.text  # relative: it holds behind a prefix, too
        answer = await server.http.get(f"/docs/{name}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert answer.text.startswith(begins) and "max-age" in answer.headers["cache-control"]
    for name in ("redoc.standalone.js", "favicon.png", "..%2f__init__.py", "x"):
        assert (await server.http.get(f"/docs/{name}")).status_code == 404
    for path in ("/", "/docs"):  # no other site may have somebody click on them
        assert "frame-ancestors 'none'" in (await server.http.get(path)).headers["content-security-policy"]


def test_the_gateway_stays_small() -> None:
    """Replicas of the gateway and the dispatcher must not load the libraries of the model."""
    code = (
        "import sys, serve_app.gateway.ingress, serve_app.dispatch.deployment;"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'deepspeed', 'av') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
