"""Mails that a request asks for."""

from __future__ import annotations

from typing import Any

import httpx

from serve_app.config import MailConfig
from serve_app.gateway.app import create_app
from tests.gateway.conftest import Server
from tests.support.databases import count_queued


async def test_mail_is_wanted_where_there_is_none(server: Server) -> None:
    for kind in ("json", "data"):
        fields: dict[str, Any] = {kind: {"prompt": "x", "notify_email": "ada@example.test"}}
        answer = await server.http.post("/v1/videos", **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "notify_email")
        assert "sends no mails" in answer.json()["error"]["message"]
    assert await count_queued(server.store) == 0


async def test_mail_is_wanted(server: Server) -> None:
    config = server.config.model_copy(update={"mail": MailConfig(host="x", sender="wan@video.test")})

    async def nothing() -> None:
        return None

    app = create_app(config, server.store, server.storage, nothing, nothing)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
        for kind in ("json", "data"):
            fields: dict[str, Any] = {kind: {"prompt": "x", "notify_email": "ada+x@mail.example.test"}}
            answer = await http.post("/v1/videos", **fields)
            assert answer.status_code == 200 and "notify_email" not in answer.json()
            job = await server.store.get(answer.json()["id"])
            assert job is not None and job.notify_email == "ada+x@mail.example.test"
        await server.ended(answer.json()["id"])
        remix = await http.post(f"/v1/videos/{answer.json()['id']}/remix", json={"prompt": "y"})
        job = await server.store.get(remix.json()["id"])
        assert job is not None and job.notify_email is None
        for wrong in (
            *("", "ada", "@b.test", "ada@", "a@b.test, c@d.test", "a@b.test;c@d.test", "A <a@b.test>", "a b@c.test"),
            *("a@b.test\r\nBcc: c@d.test", "a@b.test\n", "a@b.test\0", "a@b..test", "a@[127.0.0.1]", '"a"@b.test'),
            *("李@b.test", "a@" + "b" * 300 + ".test", "a" * 65 + "@b.test"),
        ):
            answer = await http.post("/v1/videos", json={"prompt": "x", "notify_email": wrong})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "notify_email"), wrong
